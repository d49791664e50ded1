"""A fixed set of responses in the rollout workers' place: what is left out, in which order it comes, whose answer."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import fixed_responses, samples, schedule
from cluster.fixed_responses import FixedPool, FixedResponses
from cluster.prompt_source import Prompts
from cluster.prompts import PromptStream
from cluster.run_directory import RunDirectory
from configs.run import RunConfig
from protocol.errors import UserError
from protocol.messages import NOT_SAMPLED, Rollout, RolloutMeta, RolloutRequest
from protocol.roles import Finished, Publication, RolloutPool, RolloutRef
from protocol.tokens import decode, encode_prompt, encode_response
from protocol.weights import Canary, VersionProof, WeightManifest
from tests.tiny import END_ID, tiny_tokenizer
from tests.tiny_run import tiny_config

TOKENIZER = tiny_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"prompt": "what is a fox?", "completion": "a quick animal"},
    {"prompt": "a sea?", "chosen": "green", "rejected": "blue"},
    {"prompt": "a dog?", "completions": ["lazy", "brown", "quick"], "ranks": [1, 2, 2]},
    {"prompt": [{"role": "user", "content": "a sky?"}], "completion": [{"role": "assistant", "content": "blue"}]},
    {"prompt": "a lighthouse?", "completion": "yes", "label": False},
]
ANSWERS = [
    ("what is a fox?", "a quick animal"),
    ("a sea?", "green"),
    ("a sea?", "blue"),
    ("a dog?", "lazy"),
    ("a dog?", "brown"),
    ("a dog?", "quick"),
    ("a sky?", "blue"),
    ("a lighthouse?", "yes"),
]


def config_with(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, takes: int = 3) -> RunConfig:
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return tiny_config(
        tmp_path,
        f"data.responses={{source: {path}}}",
        "rollout.source=data",
        f"rollout.responses_per_iteration={takes}",
        f"algorithm.minibatch_responses={takes}",
        *overrides,
    )


def read(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, takes: int = 3) -> FixedResponses:
    return fixed_responses.read(config_with(tmp_path, rows, *overrides, takes=takes), TOKENIZER)


def put(rollouts: Sequence[Rollout]) -> list[Finished]:
    step = tuple(rollouts)
    return [Finished(meta=RolloutMeta.of(r), payload=RolloutRef(step=step, place=n)) for n, r in enumerate(rollouts)]


class Workers:
    """Rollout workers that may be brought to a version, and must not be asked for anything else."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        raise AssertionError("the workers were asked to sample")

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        self.loaded.append(publication.manifest.policy_version)
        return ()


class Run:
    """The iterations of a run over a fixed set, as far as prompts and responses go."""

    def __init__(self, config: RunConfig, *, state: dict[str, Any] | None = None, iteration: int = 0) -> None:
        self.config = config
        self.iteration = iteration
        self.responses = fixed_responses.read(config, TOKENIZER)
        self.stream = PromptStream(self.responses.prompts, seed=config.run.seed, where="data.responses")
        if state is not None:
            self.stream.load_state_dict(state)
        self.pool: RolloutPool = FixedPool(self.responses, Workers(), put=put, group_responses=2)

    def iterate(self) -> list[Rollout]:
        prompts = self.stream.take(self.config.rollout.prompts_per_iteration)
        requests = schedule.requests(prompts, self.config, round=1, iteration=self.iteration)
        self.iteration += 1
        finished = list(self.pool.generate(requests, policy_version=self.iteration))
        assert [f.meta.key for f in finished] == [request.key for request in requests]
        return [f.payload.step[f.payload.place] for f in finished]


def said(rollout: Rollout) -> tuple[str, str]:
    return rollout.prompt.text, decode(TOKENIZER, rollout.response_ids.tolist())


def plain(rollout: Rollout) -> tuple[Any, ...]:
    return rollout.key, rollout.prompt.token_ids.tolist(), rollout.response_ids.tolist(), rollout.finish_reason


def test_every_completion_of_every_type_is_a_response_to_its_own_prompt(tmp_path: Path) -> None:
    run = Run(config_with(tmp_path, ROWS, takes=8))
    rollouts = run.iterate()
    assert sorted(map(said, rollouts)) == sorted(ANSWERS)
    for rollout in rollouts:
        prompt, response = said(rollout)
        conversation: Any = [{"role": "user", "content": prompt}]
        if prompt == "a sky?":
            answer: Any = [{"role": "assistant", "content": response}]
            assert rollout.prompt.token_ids.tolist() == encode_prompt(TOKENIZER, conversation)
            assert rollout.response_ids.tolist() == encode_response(TOKENIZER, answer, prompt=conversation)
        else:
            assert rollout.prompt.token_ids.tolist() == encode_prompt(TOKENIZER, prompt)
        assert rollout.response_ids[-1] == END_ID
        assert rollout.behavior_logprobs is None
        assert rollout.policy_versions == NOT_SAMPLED
        assert rollout.finish_reason == "stop"


def test_epochs_are_permutations_in_an_order_of_the_seed(tmp_path: Path) -> None:
    config = config_with(tmp_path, ROWS, takes=8)
    run = Run(config)
    first, second = ([said(rollout) for rollout in run.iterate()] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(ANSWERS)
    assert first != second
    assert [said(rollout) for rollout in Run(config).iterate()] == first
    other = Run(config_with(tmp_path, ROWS, "run.seed=7", takes=8))
    assert [said(rollout) for rollout in other.iterate()] != first


def test_a_resume_in_the_middle_of_an_epoch_gives_what_an_uninterrupted_run_gives(tmp_path: Path) -> None:
    config = config_with(tmp_path, ROWS, takes=3)
    whole = Run(config)
    expected = [list(map(plain, whole.iterate())) for _ in range(9)]
    for stopped in range(9):
        first = Run(config)
        found = [list(map(plain, first.iterate())) for _ in range(stopped)]
        state = json.loads(json.dumps(first.stream.state_dict()))
        second = Run(config, state=state, iteration=stopped)
        assert found + [list(map(plain, second.iterate())) for _ in range(stopped, 9)] == expected


@pytest.mark.parametrize(
    "change", [{"completion": "a slow animal"}, {"prompt": "what is a wolf?"}], ids=["response", "prompt"]
)
def test_a_set_that_has_changed_is_not_gone_on_with(tmp_path: Path, change: dict[str, str]) -> None:
    state = Run(config_with(tmp_path, ROWS)).stream.state_dict()
    with pytest.raises(UserError, match=r"data\.responses: the prompts are not those of the checkpoint"):
        Run(config_with(tmp_path, [ROWS[0] | change, *ROWS[1:]]), state=state)


def test_names_do_not_depend_on_places_and_a_response_that_comes_again_is_another(tmp_path: Path) -> None:
    names = {prompt.prompt_id for prompt in read(tmp_path, ROWS).prompts}
    assert len(names) == 8
    assert {prompt.prompt_id for prompt in read(tmp_path, ROWS[::-1]).prompts} == names
    doubled = [prompt.prompt_id for prompt in read(tmp_path, [*ROWS, ROWS[0]]).prompts]
    assert set(doubled) - names == {f"{doubled[0]}-2"}


def test_what_is_too_long_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        *ROWS,
        {"prompt": "a tree? " * 40, "chosen": "yes", "rejected": "no"},
        {"prompt": "a cat?", "chosen": "lazy " * 40, "rejected": "quick"},
        {"prompt": "a cat?", "chosen": "same", "rejected": "same"},
    ]
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, rows)
    assert len(found.prompts) == found.report.num_kept == 9
    assert found.report.dropped == {
        "prompt longer than rollout.max_prompt_tokens = 60": 2,
        "response longer than rollout.max_response_tokens = 24, its end included": 1,
    }
    assert "line 7, chosen" in caplog.text
    assert "1 dropped: chosen and rejected are identical" in caplog.text


def test_the_end_counts_as_a_token_of_the_response(tmp_path: Path) -> None:
    num_tokens = len(TOKENIZER.encode("it is a small animal that sleeps a lot"))
    rows = [*ROWS, {"prompt": "a cat?", "completion": "it is a small animal that sleeps a lot"}]
    for limit, is_kept in ((num_tokens + 1, True), (num_tokens, False)):
        found = read(tmp_path, rows, f"rollout.max_response_tokens={limit}")
        assert ("a cat?" in {prompt.text for prompt in found.prompts}) == is_kept


def test_too_few_responses_are_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 responses can be used, and an iteration takes 9"):
        read(tmp_path, ROWS, takes=9)
    with pytest.raises(UserError, match=r"data\.responses needs completions beside the prompt"):
        read(tmp_path, [{"prompt": "alone"}])


def test_no_response_answers_for_another(tmp_path: Path) -> None:
    run = Run(config_with(tmp_path, ROWS, takes=8))
    prompts = run.stream.take(8)
    requests = schedule.requests(prompts, run.config, round=1, iteration=0, samples=2)
    with pytest.raises(ValueError, match=r"#1 is none of the 8 responses"):
        list(run.pool.generate(requests, policy_version=0))
    stranger = schedule.requests(read(tmp_path, [*ROWS[1:], {"prompt": "x", "completion": "y"}]).prompts, run.config,
                                 round=1, iteration=0)  # fmt: skip
    with pytest.raises(ValueError, match="is none of the 8 responses"):
        list(run.pool.generate(stranger, policy_version=0))


def test_versions_are_for_the_workers(tmp_path: Path) -> None:
    workers = Workers()
    pool = FixedPool(read(tmp_path, ROWS), workers, put=put, group_responses=2)
    manifest = WeightManifest(
        policy_version=4,
        slots=(),
        bucket_bytes=(),
        bucket_digests=(),
        loaded_checksum=0,
        canary=Canary(token_ids=(), logprobs=()),
    )
    pool.load(Publication(manifest=manifest))
    assert workers.loaded == [4]


def test_responses_are_put_by_scoring_group(tmp_path: Path) -> None:
    sizes: list[int] = []

    def counted(rollouts: Sequence[Rollout]) -> list[Finished]:
        sizes.append(len(rollouts))
        return put(rollouts)

    run = Run(config_with(tmp_path, ROWS, takes=8))
    requests = schedule.requests(run.stream.take(8), run.config, round=1, iteration=0)
    pool = FixedPool(run.responses, Workers(), put=counted, group_responses=3)
    list(pool.generate(requests, policy_version=0))
    assert sizes == [3, 3, 2]


def test_they_are_kept_in_files_like_samples(tmp_path: Path) -> None:
    rollouts = Run(config_with(tmp_path, ROWS)).iterate()
    samples.write(tmp_path / "kept.jsonl", rollouts)
    again = samples.read(tmp_path / "kept.jsonl")
    assert list(map(plain, again)) == list(map(plain, rollouts))
    assert {rollout.behavior_logprobs for rollout in again} == {None}


@pytest.mark.parametrize("source", ["data", "policy"])
def test_the_run_chooses_who_answers(tmp_path: Path, source: str) -> None:
    config = config_with(tmp_path, ROWS) if source == "data" else tiny_config(tmp_path)
    directory = RunDirectory(tmp_path / "run")
    TOKENIZER.save_pretrained(directory.policy(0))
    prompts, workers = Prompts(config, directory), Workers()
    pool = prompts.answered(workers)
    if source == "policy":
        assert pool is workers
        assert len(prompts.stream().prompts) == 64
    else:
        assert isinstance(pool, FixedPool)
        assert [prompt.text for prompt in prompts.stream().prompts] == [prompt for prompt, _ in ANSWERS]
        assert np.array_equal(prompts.stream().prompts[0].token_ids, prompts.responses().prompts[0].token_ids)

"""The vLLM adapter on tiny random policies. vLLM changes its process for good, so it runs in child processes."""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from actors.environment import environment
from actors.errors import WeightMismatchError
from configs.rollout import RolloutConfig
from protocol.messages import Prompt, Rollout, RolloutKey, RolloutRequest
from protocol.weights import ByteArray, WeightManifest
from tests.tiny import END_ID, tiny_llama, tiny_publication, token_logprobs

CONFIG = RolloutConfig(
    max_prompt_tokens=32,
    max_response_tokens=24,
    max_concurrent_sequences=32,
    kv_cache_gib=0.03125,
    threads_per_worker=1,
)
ENGINES: dict[str, Any] = {}
"""In the child process: model directory -> engine. Several engines can live in one process."""


def in_child_engine(directory: str, config: RolloutConfig) -> Any:
    from actors.engine import VLLMEngine  # in the child only

    if directory not in ENGINES:
        ENGINES[directory] = VLLMEngine(directory, config)
    engine = ENGINES[directory]
    engine._config = config
    return engine


def in_child_build(directory: str, config: RolloutConfig) -> None:
    from actors.engine import VLLMEngine

    VLLMEngine(directory, config)


def in_child_generate(directory: str, config: RolloutConfig, requests: Sequence[RolloutRequest]) -> list[Rollout]:
    steps = in_child_engine(directory, config).generate(requests, policy_version=3, worker="rollout-0")
    return [rollout for finished in steps for rollout in finished]


def in_child_first(directory: str, config: RolloutConfig, requests: Sequence[RolloutRequest]) -> tuple[Rollout, str]:
    engine = in_child_engine(directory, config)
    responses = engine.generate(requests, policy_version=3, worker="rollout-0")
    first = next(responses)[0]
    try:
        engine.canary_logprobs([5, 6, 7])
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    responses.close()
    return first, refusal


def in_child_load(
    directory: str, config: RolloutConfig, manifest: WeightManifest, buckets: list[ByteArray]
) -> tuple[int, list[float]]:
    engine = in_child_engine(directory, config)
    engine.load(manifest, lambda bucket: buckets[bucket])
    return engine.checksum(), engine.canary_logprobs(manifest.canary.token_ids)


def in_child_listeners() -> list[str]:
    import psutil

    return [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]


class Child:
    """A process that holds engines."""

    def __init__(self) -> None:
        variables = environment(CONFIG, "cpu")
        saved = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._pool.submit(os.getpid).result(timeout=60)
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result(timeout=120)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._pool.submit(function, *arguments)

    def close(self) -> None:
        # An orderly end of the interpreter takes vLLM seconds, and there is nothing to save.
        self._pool.submit(os._exit, 0)
        self._pool.shutdown(wait=True)


@pytest.fixture(scope="module")
def children(policies: dict[str, Path]) -> Iterator[tuple[Child, Child]]:
    pair = (Child(), Child())
    for child in pair:
        child.begin(in_child_engine, str(policies["untied"]), CONFIG)
    yield pair
    for child in pair:
        child.close()


@pytest.fixture(scope="module")
def child(children: tuple[Child, Child]) -> Child:
    return children[0]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {
        "untied": tiny_llama(root / "untied"),
        # 500 rows are padded to 512 in the engine.
        "tied": tiny_llama(root / "tied", tied=True, vocab=500),
        "bfloat16": tiny_llama(root / "bfloat16", seed=2),
    }


def make_requests(count: int, *, max_response_tokens: int = 24, temperature: float = 1.0) -> list[RolloutRequest]:
    rng = np.random.default_rng(0)
    requests = []
    for i in range(count):
        key = RolloutKey(round=0, iteration=0, prompt_id=f"p{i // 2:03d}", sample=i % 2)
        tokens = rng.integers(4, 500, size=8 + i % 20).astype(np.int32)
        prompt = Prompt(prompt_id=key.prompt_id, token_ids=tokens, text="")
        requests.append(
            RolloutRequest(
                key=key,
                prompt=prompt,
                seed=key.seed(11),
                max_response_tokens=max_response_tokens,
                temperature=temperature,
            )
        )
    return requests


def by_key(rollouts: Sequence[Rollout]) -> dict[RolloutKey, tuple[list[int], list[float]]]:
    return {r.key: (r.response_ids.tolist(), r.behavior_logprobs.tolist()) for r in rollouts}


def load_model(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def moved(model: LlamaForCausalLM, *, seed: int) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def gap_to(model: LlamaForCausalLM, rollouts: Sequence[Rollout], *, temperature: float = 1.0) -> float:
    gaps = [0.0]
    for rollout in rollouts:
        tokens = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
        wanted = token_logprobs(model, tokens, temperature=temperature)[len(rollout.prompt.token_ids) :]
        gaps += [abs(a - b) for a, b in zip(wanted, rollout.behavior_logprobs.tolist(), strict=True)]
    return max(gaps)


def test_fresh_engines_agree_bit_for_bit(children: tuple[Child, Child], policies: dict[str, Path]):
    first, second = (c.call(in_child_generate, str(policies["untied"]), CONFIG, make_requests(48)) for c in children)
    assert [r.key for r in first] == [r.key for r in second]
    assert by_key(first) == by_key(second)


def test_every_request_is_answered_once_and_streams(child: Child, policies: dict[str, Path]):
    rollouts = child.call(in_child_generate, str(policies["untied"]), CONFIG, make_requests(48))
    assert sorted(r.key for r in rollouts) == sorted(r.key for r in make_requests(48))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ends = rollout.response_ids.tolist().count(END_ID)
        assert ends == (1 if rollout.finish_reason == "stop" else 0)
        assert len(rollout.response_ids) == len(rollout.behavior_logprobs)
    lengths = [len(r.response_ids) for r in rollouts]
    assert lengths.index(24) > 0, "a short response comes before the first long one"


def test_tokens_do_not_depend_on_the_other_requests_or_their_order(child: Child, policies: dict[str, Path]):
    requests = make_requests(48)
    whole = by_key(child.call(in_child_generate, str(policies["untied"]), CONFIG, requests))
    for part in (requests[::-1], requests[1::3], requests[:1]):
        for key, (tokens, logprobs) in by_key(
            child.call(in_child_generate, str(policies["untied"]), CONFIG, part)
        ).items():
            assert tokens == whole[key][0]
            assert logprobs == pytest.approx(whole[key][1], abs=1e-5)


@pytest.mark.parametrize("policy", ["untied", "tied"])
def test_i21_an_update_is_what_the_engine_computes_with(child: Child, policies: dict[str, Path], policy: str):
    directory = policies[policy]
    model = load_model(directory)
    before = child.call(in_child_generate, str(directory), CONFIG, make_requests(8))
    assert gap_to(model, before) < 1e-5
    for version in (1, 2):
        manifest, buckets = tiny_publication(moved(model, seed=version), policy_version=version, bucket_bytes=60_000)
        assert len(buckets) > 2
        checksum, canary = child.call(in_child_load, str(directory), CONFIG, manifest, buckets)
        assert checksum == manifest.loaded_checksum
        assert canary == pytest.approx(manifest.canary.logprobs, abs=1e-5)
        after = child.call(in_child_generate, str(directory), CONFIG, make_requests(8))
        assert gap_to(model, after) < 1e-5
        assert by_key(after) != by_key(before)
    restored, buckets = tiny_publication(load_model(directory), policy_version=3)
    child.call(in_child_load, str(directory), CONFIG, restored, buckets)
    assert by_key(child.call(in_child_generate, str(directory), CONFIG, make_requests(8))) == by_key(before)


def test_a_bfloat16_engine_holds_the_bits_that_were_sent(child: Child, policies: dict[str, Path]):
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    model = moved(load_model(policies["bfloat16"]), seed=1).to(torch.bfloat16).float()
    manifest, buckets = tiny_publication(model, policy_version=1, dtype=torch.bfloat16)
    checksum, canary = child.call(in_child_load, str(policies["bfloat16"]), config, manifest, buckets)
    assert checksum == manifest.loaded_checksum
    assert canary == pytest.approx(manifest.canary.logprobs, abs=0.1)


def test_a_corrupted_bucket_is_refused_and_the_next_good_load_heals(child: Child, policies: dict[str, Path]):
    directory = str(policies["untied"])
    manifest, buckets = tiny_publication(load_model(policies["untied"]), policy_version=1, bucket_bytes=60_000)
    broken = [bucket.copy() for bucket in buckets]
    broken[1][7] ^= 1
    with pytest.raises(WeightMismatchError, match="digest"):
        child.call(in_child_load, directory, CONFIG, manifest, broken)
    checksum, canary = child.call(in_child_load, directory, CONFIG, manifest, buckets)
    assert checksum == manifest.loaded_checksum
    assert canary == pytest.approx(manifest.canary.logprobs, abs=1e-5)


def test_a_tensor_that_was_not_sent_shows_in_the_checksum(child: Child, policies: dict[str, Path]):
    directory = str(policies["untied"])
    manifest, buckets = tiny_publication(moved(load_model(policies["untied"]), seed=5), policy_version=1)
    partial = dataclasses.replace(manifest, slots=manifest.slots[:-1])
    checksum, _ = child.call(in_child_load, directory, CONFIG, partial, buckets)
    assert checksum != manifest.loaded_checksum
    manifest, buckets = tiny_publication(load_model(policies["untied"]), policy_version=2)
    checksum, _ = child.call(in_child_load, directory, CONFIG, manifest, buckets)
    assert checksum == manifest.loaded_checksum


def test_behavior_logprobs_are_at_the_sampling_temperature(child: Child, policies: dict[str, Path]):
    requests = make_requests(8, temperature=0.6)
    rollouts = child.call(in_child_generate, str(policies["untied"]), CONFIG, requests)
    assert gap_to(load_model(policies["untied"]), rollouts, temperature=0.6) < 1e-5


def test_greedy_takes_the_likeliest_token(child: Child, policies: dict[str, Path]):
    config = CONFIG.model_copy(update={"decoding": "greedy"})
    model = load_model(policies["untied"])
    for rollout in child.call(in_child_generate, str(policies["untied"]), config, make_requests(4)):
        distributions = next_token_logprobs(model, rollout)
        assert rollout.response_ids.tolist() == [int(d.argmax()) for d in distributions]
        assert rollout.behavior_logprobs.tolist() == pytest.approx([float(d.max()) for d in distributions], abs=1e-5)


@pytest.mark.parametrize("update", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 7, "top_p": 0.8, "temperature": 0.8}])
def test_truncated_sampling_reports_the_distribution_that_was_sampled(
    child: Child, policies: dict[str, Path], update: dict[str, Any]
):
    config = CONFIG.model_copy(update=update)
    model = load_model(policies["untied"])
    requests = make_requests(6, temperature=config.temperature)
    for rollout in child.call(in_child_generate, str(policies["untied"]), config, requests):
        pairs = zip(rollout.response_ids.tolist(), next_token_logprobs(model, rollout), strict=True)
        wanted = [truncated_logprob(d, token, config) for token, d in pairs]
        assert rollout.behavior_logprobs.tolist() == pytest.approx(wanted, abs=2e-5)


def next_token_logprobs(model: LlamaForCausalLM, rollout: Rollout) -> list[np.ndarray]:
    tokens = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0].double(), dim=-1)
    return list(logprobs[len(rollout.prompt.token_ids) - 1 : -1].numpy())


def truncated_logprob(logprobs: np.ndarray, token: int, config: RolloutConfig) -> float:
    """Slowly: temperature, then the k likeliest, then the fewest of those that reach probability p."""
    probs = np.exp(logprobs / config.temperature)
    order = np.argsort(-probs)
    kept = list(order[: config.top_k or len(order)])
    total, nucleus = sum(probs[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(probs[j] for j in nucleus) >= config.top_p * total:
            break
    assert token in nucleus
    return float(np.log(probs[token] / sum(probs[j] for j in nucleus)))


def test_one_request_beyond_the_context_refuses_the_batch(child: Child, policies: dict[str, Path]):
    directory = str(policies["untied"])
    requests = [*make_requests(3), dataclasses.replace(make_requests(4)[3], max_response_tokens=60)]
    with pytest.raises(ValueError, match="context holds 56"):
        child.call(in_child_generate, directory, CONFIG, requests)
    assert child.call(
        in_child_load, directory, CONFIG, *tiny_publication(load_model(policies["untied"]), policy_version=1)
    )


def test_a_consumer_that_leaves_takes_its_requests_along(child: Child, policies: dict[str, Path]):
    directory = str(policies["untied"])
    whole = by_key(child.call(in_child_generate, directory, CONFIG, make_requests(48)))
    first, refusal = child.call(in_child_first, directory, CONFIG, make_requests(48))
    assert by_key([first])[first.key] == whole[first.key]
    assert "canary" in refusal, "the canary waits until nothing is being sampled"
    assert by_key(child.call(in_child_generate, directory, CONFIG, make_requests(48))) == whole


def test_nothing_listens_on_a_routable_address(child: Child):
    assert set(child.call(in_child_listeners)) <= {"127.0.0.1", "::1"}


def test_a_process_that_was_started_without_its_environment_is_refused(child: Child, policies: dict[str, Path]):
    config = CONFIG.model_copy(update={"threads_per_worker": 7})
    with pytest.raises(RuntimeError, match="not set: MKL_NUM_THREADS, OMP_NUM_THREADS"):
        child.call(in_child_build, str(policies["untied"]), config)

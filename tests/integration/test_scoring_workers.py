"""Reward and reference workers as real Ray actors, against plain transformers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.algorithm import PPOConfig
from configs.data import DataConfig, SourceConfig
from configs.models import CriticModelConfig, ModelsConfig, PolicyModelConfig
from configs.rollout import RolloutConfig
from configs.run import RunConfig, RunSection
from configs.scoring import FunctionRewardConfig, GoldConfig, ModelRewardConfig, ScoringConfig, TruncationConfig
from protocol.errors import UserError
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey
from protocol.roles import RolloutRef
from reward_service import scoring, worker
from reward_service.reference_model import ReferenceModel
from reward_service.reward_model import RewardModel
from tests.tiny import END_ID, tiny_llama, tiny_tokenizer

HERE = "tests.integration.test_scoring_workers"
TEMPERATURE = 0.7
GAIN, BIAS = 2.5, -0.75


def response_length(*, responses: list[str], **batch: object) -> list[float]:
    return [float(len(response)) for response in responses]


def twice_the_length(**columns: list[str]) -> list[float]:
    return [2 * length for length in response_length(**columns)]


def nan_on_third(*, prompts: list[str], **batch: object) -> list[float]:
    return [math.nan if prompt == "prompt 2" else 0.0 for prompt in prompts]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=1)


def write_reward_model(directory: Path, policy: Path, *, seed: int, calibrated: bool = True) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    if calibrated:
        model.config.rondo_calibration = {"gain": GAIN, "bias": BIAS, "anchor": "ref_policy", "num_responses": 8}
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("models") / "reward", policy, seed=2)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(12):
        response = rng.integers(4, 512, size=int(rng.integers(1, 24))).astype(np.int32)
        stopped = number % 3 != 0
        if stopped:
            response[-1] = END_ID
        made.append(
            Rollout(
                key=RolloutKey(0, 2, f"p{number:02d}", 0),
                prompt=Prompt(
                    prompt_id=f"p{number:02d}",
                    token_ids=rng.integers(4, 512, size=int(rng.integers(2, 20))).astype(np.int32),
                    text=f"prompt {number}",
                ),
                response_ids=response,
                behavior_logprobs=-rng.random(len(response)).astype(np.float32),
                finish_reason="stop" if stopped else "length",
                policy_versions=PolicyVersions(0, 0),
                worker="rollout-0",
            )
        )
    return made


def run_config(policy: Path, **changes: object) -> RunConfig:
    return RunConfig(
        run=RunSection(name="test"),
        models=ModelsConfig(policy=PolicyModelConfig(path=str(policy)), critic=CriticModelConfig(init="policy")),
        data=DataConfig(
            prompts=SourceConfig(source="prompts.jsonl"), preferences=SourceConfig(source="preferences.jsonl")
        ),
        rollout=RolloutConfig(max_prompt_tokens=24, max_response_tokens=24, temperature=TEMPERATURE),
        scoring=ScoringConfig(micro_batch_tokens=96, **changes),
        algorithm=PPOConfig(),
    )


def start(config: RunConfig, policy: Path, tmp_path: Path, *, trained: Path | None = None) -> ray.actor.ActorHandle:
    return (
        worker.reward_worker_class()
        .options(num_cpus=0.5, runtime_env={"env_vars": worker.environment(config)})
        .remote(config=config, name="reward-0", policy=policy, trained=trained, incidents=tmp_path / "incidents")
    )


def put(rollouts: list[Rollout]) -> list[RolloutRef]:
    """Put rollouts into the object store as an engine's steps leave them: a few together."""
    steps = [ray.put(tuple(rollouts[start : start + 5])) for start in range(0, len(rollouts), 5)]
    return [RolloutRef(steps[number // 5], number % 5) for number in range(len(rollouts))]


def expected_logits(directory: Path, rollouts: list[Rollout]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        sequences = [np.concatenate([r.prompt.token_ids, r.response_ids]) for r in rollouts]
        return np.array([model(torch.from_numpy(ids).long()[None]).logits.item() for ids in sequences])


@pytest.mark.usefixtures("cluster")
def test_scores_are_the_calibrated_logits(
    policy: Path, reward_model: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    config = run_config(
        policy,
        rewards=[
            ModelRewardConfig(weight=2.0),
            FunctionRewardConfig(name="length", path=f"{HERE}:response_length", weight=0.01),
        ],
        truncation=TruncationConfig(rule="subtract", penalty=1.5),
        gold=GoldConfig(path=f"{HERE}:twice_the_length", components={"again": f"{HERE}:response_length"}),
    )
    pool = start(config, policy, tmp_path, trained=reward_model)
    refs = [RolloutRef(ray.put((rollout,)), 0) for rollout in rollouts]
    report, scores = pool.score.remote(refs)
    result = ray.get(report, timeout=60)
    assert ray.get(scores, timeout=60).gold == {}, "the learner would see the gold score"

    logits = expected_logits(reward_model, rollouts)
    lengths = [len(tiny_tokenizer().decode(r.response_ids, skip_special_tokens=True)) for r in rollouts]
    penalty = [1.5 if r.finish_reason == "length" else 0.0 for r in rollouts]
    assert result.keys == tuple(rollout.key for rollout in rollouts)
    np.testing.assert_allclose(result.components["reward_model"], GAIN * logits + BIAS, rtol=1e-5, atol=1e-5)
    assert result.components["length"].tolist() == lengths
    expected = 2.0 * (GAIN * logits + BIAS) + 0.01 * np.array(lengths) - penalty
    np.testing.assert_allclose(result.scores, expected, atol=1e-4)
    assert result.gold["again"].tolist() == lengths
    assert result.gold["gold"].tolist() == [2 * length for length in lengths]
    assert result.busy_s > 0

    raw: Any = ray.get(pool.raw_scores.remote(refs), timeout=60)
    np.testing.assert_allclose(raw["reward_model"], logits, rtol=1e-5, atol=1e-5)
    turned = ray.get(pool.score.remote(refs[::-1])[0], timeout=60)
    assert turned.keys == result.keys[::-1]
    np.testing.assert_allclose(turned.scores[::-1], result.scores, rtol=1e-5, atol=1e-6)
    assert status_of(pool)["num_responses"] == 36
    ray.kill(pool)


@pytest.mark.usefixtures("cluster")
def test_reference_logprobs_are_those_of_transformers(policy: Path, rollouts: list[Rollout]) -> None:
    config = run_config(policy)
    pool = worker.reference_worker_class().remote(config=config, name="reference-0", path=policy)
    refs = [RolloutRef(ray.put((rollout,)), 0) for rollout in rollouts]
    summary, logprobs = ray.get(list(pool.logprobs.remote(refs)), timeout=60)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    assert summary.keys == logprobs.keys == tuple(rollout.key for rollout in rollouts)
    for place, rollout in enumerate(rollouts):
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
        with torch.no_grad():
            everything = torch.log_softmax(model(ids[None]).logits[0].double() / TEMPERATURE, dim=-1)
        at = range(len(rollout.prompt.token_ids), len(ids))
        expected = np.array([everything[position - 1, ids[position]].item() for position in at])
        np.testing.assert_allclose(logprobs.logprobs[place], expected, atol=1e-5)
        kl = float((rollout.behavior_logprobs - expected).sum())
        assert summary.behavior_kl_nats[rollout.key] == pytest.approx(kl, abs=1e-4)
    assert status_of(pool)["models"] == {"reference": str(policy)}
    ray.kill(pool)


@pytest.mark.usefixtures("cluster")
def test_a_nan_reward_ends_the_group_and_saves_it(policy: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    config = run_config(policy, rewards=[FunctionRewardConfig(name="odd", path=f"{HERE}:nan_on_third")])
    pool = start(config, policy, tmp_path)
    with pytest.raises(RayTaskError) as caught:
        ray.get(pool.score.remote([RolloutRef(ray.put((rollout,)), 0) for rollout in rollouts[:6]])[0], timeout=60)
    error = caught.value.cause
    assert isinstance(error, scoring.RewardError)
    assert (error.component, error.key) == ("odd", rollouts[2].key)
    assert "r0/i2/p02#0" in str(error)
    assert error.incident is not None
    record = json.loads(Path(error.incident).read_text())
    assert (record["kind"], record["round"], record["iteration"]) == ("reward_failed", 0, 2)
    saved = (tmp_path / "incidents" / record["data"]["batch"]).read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in saved] == [f"prompt {number}" for number in range(6)]
    ray.kill(pool)


@pytest.mark.usefixtures("cluster")
def test_a_new_reward_model_is_calibrated_before_it_scores(
    policy: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    rewards = [
        ModelRewardConfig(),
        FunctionRewardConfig(name="length", path=f"{HERE}:response_length", normalization="reference"),
    ]
    fresh = write_reward_model(tmp_path / "fresh", policy, seed=3, calibrated=False)
    pool = start(run_config(policy, rewards=rewards), policy, tmp_path, trained=fresh)
    refs = [RolloutRef(ray.put((rollout,)), 0) for rollout in rollouts]
    assert status_of(pool)["uncalibrated"] == ["reward_model", "length"]
    with pytest.raises(RayTaskError) as caught:
        ray.get(pool.score.remote(refs)[0], timeout=60)
    assert isinstance(caught.value.cause, UserError)

    raw: Any = ray.get(pool.raw_scores.remote(refs), timeout=60)
    found = {name: scoring.calibrate(scores) for name, scores in raw.items()}
    ray.get(pool.load.remote(calibrations=found), timeout=60)
    result = ray.get(pool.score.remote(refs)[0], timeout=60)
    for component in result.components.values():
        assert component.mean() == pytest.approx(0, abs=1e-4)
        assert component.std() == pytest.approx(1, abs=1e-4)

    ready = write_reward_model(tmp_path / "ready", policy, seed=4)
    ray.get(pool.load.remote(trained=ready), timeout=60)
    result = ray.get(pool.score.remote(refs)[0], timeout=60)
    expected = GAIN * expected_logits(ready, rollouts) + BIAS
    np.testing.assert_allclose(result.components["reward_model"], expected, rtol=1e-5, atol=1e-5)
    ray.kill(pool)


@pytest.mark.usefixtures("cluster")
def test_a_reward_model_with_another_tokenizer_is_refused(policy: Path, tmp_path: Path) -> None:
    directory = write_reward_model(tmp_path / "foreign", policy, seed=5)
    tiny_tokenizer(vocab=300).save_pretrained(directory)
    pool = start(run_config(policy), policy, tmp_path, trained=directory)
    with pytest.raises(ray.exceptions.RayActorError, match="another tokenizer"):
        status_of(pool)


def test_models_of_the_wrong_kind_are_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a sequence classifier"):
        RewardModel(str(policy))
    with pytest.raises(UserError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "nowhere"))
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="3 labels"):
        RewardModel(str(tmp_path / "three"))
    with pytest.raises(UserError, match="cannot be loaded"):
        ReferenceModel(str(tmp_path / "nowhere"), temperature=1.0)


@pytest.mark.parametrize("tied", [False, True])
def test_batch_mates_do_not_change_a_score(tied: bool, tmp_path: Path) -> None:
    policy = tiny_llama(tmp_path / "policy", tied=tied)
    directory = write_reward_model(tmp_path / "reward", policy, seed=6)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(4, 512, size=size).astype(np.int32) for size in (3, 40, 7, 7, 25)]
    together = RewardModel(str(directory), micro_batch_tokens=300).raw_scores(sequences)
    alone = RewardModel(str(directory), micro_batch_tokens=40).raw_scores(sequences)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    reference = ReferenceModel(str(policy), temperature=1.0, micro_batch_tokens=300)
    halves = [(ids[:2], ids[2:]) for ids in sequences]
    whole = reference.logprobs([p for p, _ in halves], [r for _, r in halves])
    for (prompt, response), found in zip(halves, whole, strict=True):
        np.testing.assert_allclose(reference.logprobs([prompt], [response])[0], found, atol=1e-5)


def status_of(worker: Any) -> dict[str, Any]:
    return ray.get(worker.status.remote(), timeout=60)

"""One arm: an algorithm, a seed and a reward, run through the real Updater; its curve is one CSV file.

An iteration is what it is in production: sample, score, learn. Every few iterations the policy answers fresh prompts,
which all arms of a seed have in common, and gold, proxy and the distance from the supervised policy are read off.
"""

import csv
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.laboratory import networks
from benchmarks.experiments.laboratory.language import MAX_TOKENS, Gold, draw_prompts, read_prompt
from benchmarks.experiments.laboratory.networks import PASSES
from benchmarks.experiments.laboratory.sampling import Samples, distance, logprobs_of, sample
from benchmarks.experiments.laboratory.units import PerTokenUpdater, WrongUnit
from benchmarks.experiments.laboratory.world import RewardModel, RewardSpec, Size, World
from configs.algorithm import AlgorithmConfig
from configs.base import Section
from configs.scoring import CombineConfig, LinearCombination
from configs.selection import DPOConfig, RFTConfig
from learner.selection_update import SelectionSettings, SelectionUpdater
from learner.supervised_loop import stage_seed
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from protocol.messages import FloatArray, PolicyVersions, Prompt, Rollout, RolloutKey, ScoredBatch, ScoredRollout
from reward_service.combination import combine

NUM_ROLLOUTS = 128
SAMPLES_PER_PROMPT = 4
"""Where a prompt's responses are compared; then there are as many times fewer prompts, and as many rollouts."""
CRITIC_RATE = 2e-3
MISSING_EOS_PENALTY = 1.0
"""In standard deviations of the score, taken from responses that were cut."""
NUM_EVALUATED = 256
FIRST_KEYS = frozenset((
    "minibatch_responses", "num_epochs", "name", "advantage", "gamma", "gae_lambda", "truncated_value",
    "aggregation", "critic_warmup_iterations", "correction", "weight", "low", "high", "old_policy", "alarm_k3",
    "kl_beta", "kl_controller", "kind", "target_nats_per_sequence", "horizon_episodes", "kl_in", "kl_estimator",
    "entropy_bonus", "clip_low", "clip_high", "dual_clip", "max_approx_kl", "value_clip", "adv_norm",
    "ptx_coefficient", "ptx_texts", "apa_lambda", "awr_lambda", "max_weight", "dpo_beta", "flip_probability",
    "kept_per_prompt", "memory_responses", "num_stds", "helpfulness", "safety", "threshold", "tag",
))  # fmt: skip
"""Keys of `algorithm` and `combination` that the first digests counted, with their default or not. No key is added to
these; the default of a key that is none of them stays as it is, since curves have it that do not say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run."""

    experiment: str
    name: str
    algorithm: AlgorithmConfig
    learning_rate: float
    seed: int
    iterations: int = 150
    rewards: tuple[RewardSpec, ...] = (RewardSpec(),)
    combination: CombineConfig = field(default_factory=LinearCombination)
    gold: Gold = "helpful"
    wrong_unit: WrongUnit | None = None
    """What the adaptive controller is fed instead of the KL per sequence."""
    evaluate_every: int = 5
    size: Size = field(default_factory=Size)

    @property
    def samples_per_prompt(self) -> int:
        """Count the responses to each prompt: one where a critic tells what to expect of it."""
        return SAMPLES_PER_PROMPT if isinstance(self.algorithm, DPOConfig | RFTConfig) else 1

    @property
    def digest(self) -> str:
        """Name what decides about the curve: everything but what the arm is called.

        A key that the configuration has got since the first curves counts only where it is set: a curve stays that of
        its settings when there are more of them.
        """
        anonymous = replace(self, experiment="", name="")
        settings = ", ".join(f"{own.name}={described(getattr(anonymous, own.name))}" for own in fields(anonymous))
        return f"{zlib.crc32(f'Arm({settings})'.encode()):08x}"

    @property
    def file(self) -> str:
        """The curve's place below the folder of results; different settings have different files."""
        return f"{self.experiment}/raw/{self.name}-seed{self.seed}-{self.digest}.csv"


def described(value: object) -> str:
    """Write a setting as `repr` does, but for keys of the configuration that came later and have their default."""
    if not isinstance(value, Section):
        return repr(value)
    known = type(value).model_fields
    counted = [(key, one) for key, one in value if key in FIRST_KEYS or one != known[key].get_default()]
    return f"{type(value).__name__}({', '.join(f'{key}={described(one)}' for key, one in counted)})"


class Scorer:
    """The reward models of an arm as one score, by the production rule."""

    def __init__(self, world: World, arm: Arm) -> None:
        self._models: dict[str, RewardModel] = {spec.name: world.reward_model(spec) for spec in arm.rewards}
        self._rule = arm.combination

    def __call__(self, samples: Samples) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Score samples: [B] combined, without the penalty for missing ends, and every component."""
        components = {name: model(samples) for name, model in self._models.items()}
        about_safety = [read_prompt(prompt).sensitive for prompt in samples.prompts]
        weights = dict.fromkeys(components, 1.0)
        return combine(components, weights=weights, config=self._rule, about_safety=about_safety), components


def run(arm: Arm, worlds: Path, results: Path) -> Path:
    """Run an arm; a finished one is left as it is, and one that another experiment has run is copied.

    Args:
        arm: What to run.
        worlds: Where the worlds of all seeds are kept, and curves for arms that experiments have in common.
        results: Where curves go.

    Returns:
        The curve's file.
    """
    path, shared = results / arm.file, worlds / "curves" / f"{arm.digest}.csv"
    if path.exists():
        return path
    if not shared.exists():
        _write(shared, list(curve(arm, World(worlds, seed=arm.seed, size=arm.size))))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    shutil.copyfile(shared, draft)
    draft.replace(path)
    return path


def _write(path: Path, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    draft.replace(path)


def curve(arm: Arm, world: World) -> Iterator[dict[str, float]]:
    """Train, and describe the policy before the first iteration, every few, and at the end.

    Args:
        arm: What to run.
        world: Of its seed.

    Yields:
        Figures by name, the same names each time.
    """
    scorer, policy = Scorer(world, arm), networks.copy_of(world.policy).requires_grad_(True)
    updater = make_updater(arm, world, policy)
    rng = np.random.default_rng(stage_seed(arm.seed, "prompts"))
    last: dict[str, float] = {}
    for iteration in range(arm.iterations + 1):
        if iteration % arm.evaluate_every == 0 or iteration == arm.iterations:
            beta = 0.0 if updater.controller is None else updater.controller.beta
            steering = {"kl_beta": beta, "advantage_std": last.get(names.POLICY_ADVANTAGE_STD, np.nan)}
            steering["beta_eff"] = last.get(names.POLICY_BETA_EFF, np.nan)
            yield {"iteration": float(iteration)} | evaluate(arm, world, policy, scorer) | steering
        if iteration < arm.iterations:
            each = arm.samples_per_prompt
            prompts = [prompt for prompt in draw_prompts(NUM_ROLLOUTS // each, rng) for _ in range(each)]
            samples = sample(policy, prompts, seed=stage_seed(arm.seed, "rollouts", iteration))
            score, components = scorer(samples)
            batch = scored_batch(samples, score, components, world=world, iteration=iteration, each=each)
            last = dict(updater.update(batch).metrics)
    for engine in updater.engines.values():
        engine.close()


def make_updater(arm: Arm, world: World, policy: Any) -> Updater | SelectionUpdater:
    """Put the policy under an engine, and a critic where the algorithm has one.

    The critic starts from the supervised policy's trunk with a head of zeros: every state is worth the mean of
    calibrated scores. With a random head the first advantages are noise, and APA was 8 nats away after one iteration.
    """
    engine, critic = networks.engine(policy, learning_rate=arm.learning_rate, name="policy"), None
    if isinstance(arm.algorithm, DPOConfig | RFTConfig):
        chosen = SelectionSettings(algorithm=arm.algorithm, passes=PASSES, run_seed=arm.seed)
        return SelectionUpdater(policy=engine, settings=chosen)
    if arm.algorithm.has_critic:
        network = networks.scalar_on(world.policy, seed=stage_seed(arm.seed, "critic"))
        torch.nn.init.zeros_(network.network.score.weight)
        critic = networks.engine(network.requires_grad_(True), learning_rate=CRITIC_RATE, name="critic")
    settings = UpdateSettings(algorithm=arm.algorithm, passes=PASSES, max_response_tokens=MAX_TOKENS, run_seed=arm.seed)
    if arm.wrong_unit is not None:
        return PerTokenUpdater(policy=engine, critic=critic, settings=settings, unit=arm.wrong_unit)
    return Updater(policy=engine, critic=critic, settings=settings)


def scored_batch(
    samples: Samples, score: FloatArray, components: dict[str, FloatArray], *, world: World, iteration: int, each: int
) -> ScoredBatch:
    """Put samples, scores and the reference's log-probs together, as production does.

    A prompt's name says its iteration: what an updater remembers of one is never taken for another's.

    Args:
        samples: `each` of a prompt next to each other.
        score: [B] combined.
        components: [B] each.
        world: Whose supervised policy is the reference.
        iteration: Which sampled them.
        each: Responses to a prompt.

    Returns:
        The batch, in key order.
    """
    references = logprobs_of(world.policy, samples)
    versions = PolicyVersions(iteration, iteration)
    scored: list[ScoredRollout] = []
    for i, (prompt, response) in enumerate(zip(samples.prompts, samples.responses, strict=True)):
        cut, name = samples.truncated[i], f"{iteration:04d}-{i // each:04d}"
        rollout = Rollout(
            key=RolloutKey(1, iteration, name, i % each),
            prompt=Prompt(prompt_id=name, token_ids=prompt, text=""),
            response_ids=response,
            behavior_logprobs=samples.logprobs[i],
            finish_reason="length" if cut else "stop",
            policy_versions=versions,
            worker="laboratory",
        )
        total = float(score[i]) - MISSING_EOS_PENALTY * cut
        own = {name: float(values[i]) for name, values in components.items()}
        scored.append(ScoredRollout(rollout=rollout, score=total, components=own, ref_logprobs=references[i]))
    return ScoredBatch(round=1, iteration=iteration, policy_version=iteration, rollouts=tuple(scored))


def evaluate(arm: Arm, world: World, policy: Any, scorer: Scorer) -> dict[str, float]:
    """Read gold, proxy and distance off the policy's answers to fresh prompts, the same for all arms of a seed."""
    prompts = draw_prompts(NUM_EVALUATED, np.random.default_rng(stage_seed(arm.seed, "evaluation prompts")))
    samples = sample(policy, prompts, seed=stage_seed(arm.seed, "evaluation samples"))
    score, components = scorer(samples)
    away = distance(policy, world.policy, samples)
    about_harm = any(spec.gold in ("harmless", "mixed") for spec in arm.rewards)
    return (
        (by_stake(world, samples) if about_harm else {})
        | {
            "gold": float(world.standardised_gold(samples, arm.gold).mean()),
            "proxy": float(score.mean()),
            "kl_exact_nats": away.exact_nats,
            "kl_k1_nats": away.k1_nats,
            "kl_k1_nats_per_token": away.k1_nats_per_token,
            "kl_released_code": away.released,
            "entropy_nats_per_token": away.entropy_nats_per_token,
            "response_tokens": float(np.mean([len(response) for response in samples.responses])),
            "truncated_fraction": float(np.mean(samples.truncated)),
        }
        | (
            {f"proxy_{name}": float(values.mean()) for name, values in components.items()}
            if len(components) > 1
            else {}
        )
    )


def by_stake(world: World, samples: Samples) -> dict[str, float]:
    """Read gold apart where harm is at stake and elsewhere; elsewhere no answer does any harm."""
    sensitive = np.array([read_prompt(prompt).sensitive for prompt in samples.prompts])
    helpful, harmless = (world.standardised_gold(samples, gold) for gold in ("helpful", "harmless"))
    return {
        "helpful_sensitive": float(helpful[sensitive].mean()),
        "helpful_other": float(helpful[~sensitive].mean()),
        "harmless_sensitive": float(harmless[sensitive].mean()),
    }

"""One world a seed: the supervised policy and the reward models that all arms of that seed share, cached on disk.

Tuned on seed 0, before any result: sizes, learning rates and epochs below, so that the supervised policy is mediocre
(it imitates demonstrations of mediocre worth, and not perfectly) and a reward model of 8,000 pairs decides 85 to 95 of
100 held-out pairs as gold does: 0.915 with these, and 0.82 after two epochs, whatever the learning rate.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.experiments.laboratory import networks
from benchmarks.experiments.laboratory.language import GOLDS, PAD, Floats, Gold, demonstrate, draw_prompts, worth
from benchmarks.experiments.laboratory.networks import LEARNER, PASSES, POLICY_WIDTH
from benchmarks.experiments.laboratory.rank import single_rank
from benchmarks.experiments.laboratory.sampling import Samples, sample, scores
from learner.batch import TokenSequence
from learner.comparison_task import ComparisonTask
from learner.comparisons import BASE, Comparisons
from learner.models import PolicyModel, ScalarModel
from learner.ops.reward_model import calibration
from learner.supervised import DemonstrationTask
from learner.supervised_loop import run_steps, shuffled_steps, stage_seed
from learner.validation import validation_report
from protocol.messages import FloatArray

NUM_DEMONSTRATIONS, SFT_EPOCHS, SFT_BATCH, SFT_RATE = 5000, 6, 64, 4e-3
PAIR_EPOCHS, PAIR_BATCH, PAIR_RATE = 4, 32, 2e-3
NUM_HELDOUT_PAIRS = 1000
NUM_ANCHORS = 2048
"""Samples of the supervised policy that give every score its zero and its unit."""
_CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """Which reward model."""

    gold: Gold | Literal["mixed"] = "helpful"
    """Whose labels it learns from; `mixed`: the very pairs of a helpful and of a harmless model, half of each."""
    num_pairs: int = 8000
    labels: Literal["hard", "sampled"] = "hard"
    """Whether the better of a pair always wins, or with the Bradley-Terry chance of the standardised gold scores."""
    width: int = POLICY_WIDTH
    draw: int = 0
    """Number of the draw of pairs and of the head, for ensembles."""

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.gold}-{self.num_pairs}-{self.labels}-w{self.width}-d{self.draw}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """A frozen reward model, in units of the standard deviation of the supervised policy's samples."""

    network: ScalarModel
    gain: float
    bias: float

    def __call__(self, samples: Samples) -> FloatArray:
        """Score samples: [B]."""
        return (self.gain * scores(self.network, samples) + self.bias).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much work goes into a world; the reduced one is for a check that everything runs."""

    demonstrations: int = NUM_DEMONSTRATIONS
    sft_epochs: int = SFT_EPOCHS
    heldout_pairs: int = NUM_HELDOUT_PAIRS
    anchors: int = NUM_ANCHORS


class World:
    """A seed's supervised policy, reward models and units of gold; made where they are not on disk yet.

    Args:
        directory: Of the worlds of all seeds and sizes.
        seed: Of everything in it.
        size: How much work.
    """

    def __init__(self, directory: Path, *, seed: int, size: Size | None = None) -> None:
        single_rank()
        self.seed, self._size = seed, size or Size()
        self._directory = directory / f"seed{seed}{'' if self._size == Size() else '-reduced'}"
        self.policy = self.trunk(POLICY_WIDTH)

    def trunk(self, width: int) -> PolicyModel:
        """Give the supervised policy of a width; the one of 64 is what is optimised."""
        path = self._directory / f"sft-w{width}.safetensors"
        if not path.exists():
            networks.save(self._imitate(width), path)
        return networks.load_policy(path, width=width).eval().requires_grad_(False)

    def reward_model(self, spec: RewardSpec) -> RewardModel:
        """Give a reward model, calibrated and frozen."""
        path = self._directory / f"rm-{spec.name}.safetensors"
        if not self._report_of(spec).exists():
            network, report = self._learn_pairs(spec)
            networks.save(network, path)
            self._report_of(spec).write_text(json.dumps(report, indent=1))
        network = networks.load_scalar(path, width=spec.width).eval().requires_grad_(False)
        report = self.report(spec)
        return RewardModel(network=network, gain=report["gain"], bias=report["bias"])

    def report(self, spec: RewardSpec) -> dict[str, float]:
        """Read what a reward model is worth on held-out pairs, and its calibration."""
        return json.loads(self._report_of(spec).read_text())

    def unit(self, gold: Gold) -> tuple[float, float]:
        """Give mean and standard deviation of a gold score over samples of the supervised policy."""
        path = self._directory / "gold.json"
        if not path.exists():
            anchors = self._anchors()
            golds = {name: gold_of(anchors, name) for name in GOLDS}
            units = {name: (float(values.mean()), float(values.std())) for name, values in golds.items()}
            path.write_text(json.dumps(units))
        mean, std = json.loads(path.read_text())[gold]
        return mean, std

    def standardised_gold(self, samples: Samples, gold: Gold) -> FloatArray:
        """Compute gold in standard deviations of the supervised policy's samples, from their mean: [B]."""
        mean, std = self.unit(gold)
        return ((gold_of(samples, gold) - mean) / std).astype(np.float32)

    def _report_of(self, spec: RewardSpec) -> Path:
        return self._directory / f"rm-{spec.name}.json"

    def _rng(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(stage_seed(self.seed, *what))

    def _anchors(self) -> Samples:
        prompts = draw_prompts(self._size.anchors, self._rng("anchors"))
        return sample(self.policy, prompts, seed=stage_seed(self.seed, "anchor samples"))

    def _imitate(self, width: int) -> PolicyModel:
        rng = self._rng("demonstrations")
        prompts = draw_prompts(self._size.demonstrations, rng)
        sequences = [TokenSequence(prompt, demonstrate(prompt, rng)) for prompt in prompts]
        policy = networks.new_policy(width, seed=stage_seed(self.seed, "policy", width))
        steps = shuffled_steps(
            len(sequences),
            size=SFT_BATCH,
            num_epochs=self._size.sft_epochs,
            num_steps=None,
            seed=lambda epoch: stage_seed(self.seed, "sft", epoch),
        )
        engine = networks.engine(policy, learning_rate=SFT_RATE, name="supervised policy", total_steps=len(steps))
        task = DemonstrationTask(sequences, pad_id=PAD, layout=PASSES.layout, device=torch.device("cpu"))
        run_steps(engine, task, steps, settings=LEARNER, report=lambda figures: None)
        trained = networks.copy_of(policy)
        engine.close()
        return trained

    def _learn_pairs(self, spec: RewardSpec) -> tuple[ScalarModel, dict[str, float]]:
        pairs = self.pairs(spec, num=spec.num_pairs, what="pairs")
        heldout = self.pairs(spec, num=self._size.heldout_pairs, what="held-out pairs", hard=True)
        network = networks.scalar_on(self.trunk(spec.width), seed=stage_seed(self.seed, "head", spec.draw))
        network.requires_grad_(True)
        steps = shuffled_steps(
            len(pairs),
            size=PAIR_BATCH,
            num_epochs=PAIR_EPOCHS,
            num_steps=None,
            seed=lambda epoch: stage_seed(self.seed, "reward model", spec.draw, epoch),
        )
        engine = networks.engine(network, learning_rate=PAIR_RATE, name="reward model", total_steps=len(steps))
        run_steps(engine, _task(pairs), steps, settings=LEARNER, report=lambda figures: None)
        gain, bias = calibration(torch.from_numpy(scores(network, self._anchors())))
        report = {k: float(value) for k, value in judged(network, heldout).items() if isinstance(value, int | float)}
        report |= {"train_accuracy": judged(network, pairs)["accuracy"], "gain": gain, "bias": bias}
        engine.close()
        return network, report

    def pairs(self, spec: RewardSpec, *, num: int, what: str, hard: bool = False) -> list[Comparisons]:
        """Draw labelled pairs of the supervised policy's samples; a smaller number is the beginning of a larger one.

        Args:
            spec: Gold, labels and draw.
            num: How many; pairs of equal worth are not counted.
            what: Names the draw.
            hard: Label by gold alone, whatever the specification says.

        Returns:
            One pair a prompt.
        """
        if spec.gold == "mixed":
            golds: tuple[Gold, Gold] = ("helpful", "harmless")
            halves = [self.pairs(replace(spec, gold=g), num=-(-num // 2), what=what, hard=hard) for g in golds]
            return [pair for both in zip(*halves, strict=True) for pair in both][:num]
        pairs: list[Comparisons] = []
        std = self.unit(spec.gold)[1]
        sensitive = True if spec.gold == "harmless" else None
        chunk = 0
        while len(pairs) < num:
            part = (what, spec.gold, spec.draw, chunk)
            rng = self._rng(*part)
            prompts = [prompt for prompt in draw_prompts(_CHUNK, rng, sensitive=sensitive) for _ in range(2)]
            samples = sample(self.policy, prompts, seed=stage_seed(self.seed, *part, "samples"))
            gold = gold_of(samples, spec.gold) / std
            lead = gold[::2] - gold[1::2]
            if spec.labels == "sampled" and not hard:
                lead = np.where(rng.random(_CHUNK) < 1 / (1 + np.exp(-lead)), 1.0, -1.0)
            sequences = samples.sequences
            pairs += [_pair(sequences[2 * i : 2 * i + 2], lead[i]) for i in range(_CHUNK) if lead[i] != 0]
            chunk += 1
        return pairs[:num]


def gold_of(samples: Samples, gold: Gold) -> Floats:
    """Compute what samples are worth: [B], as the language says."""
    return np.array([worth(p, r, gold=gold) for p, r in zip(samples.prompts, samples.responses, strict=True)])


def judged(network: ScalarModel, pairs: Sequence[Comparisons]) -> dict[str, Any]:
    """Judge a reward model by labelled pairs, one each."""
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    samples = Samples(prompts=[s.prompt_ids for s in sequences], responses=[s.response_ids for s in sequences])
    starts = 2 * np.arange(len(pairs))
    return validation_report(
        scores(network, samples).astype(np.float64),
        better=starts + np.array([pair.better[0] for pair in pairs]),
        worse=starts + np.array([pair.worse[0] for pair in pairs]),
        response_tokens=np.array([len(s.response_ids) for s in sequences]),
    )


def _pair(sequences: Sequence[TokenSequence], lead: float) -> Comparisons:
    better = 0 if lead > 0 else 1
    return Comparisons(
        sequences=tuple(sequences),
        better=(better,),
        worse=(1 - better,),
        margins=(0.0,),
        sources=(BASE,),
        weights=(1.0,),
        rankings=(),
    )


def _task(pairs: Sequence[Comparisons]) -> ComparisonTask:
    return ComparisonTask(pairs, centering=0.0, pad_id=PAD, layout=PASSES.layout, device=torch.device("cpu"))

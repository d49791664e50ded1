"""A run directory as two rounds leave it, written without training anything."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cluster import lineage, samples
from cluster.lineage import Artefact
from cluster.run_directory import RunDirectory, claim
from cluster.schedule import Phase, RunState
from configs.load import load
from configs.run import RunConfig
from learner.validation import paired_gain, validation_report
from protocol.files import write_json
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey, RoundReport
from reward_service.ladder import Comparison, Drift, fit_ladder
from reward_service.preferences.records import Candidate, Label, Outcome, Task
from reward_service.preferences.store import PreferenceStore

ENDS = {1: 20, 2: 41}
"""Round -> the policy version that it ends with."""
_WORTH = {"v000": 0.0, "v020": 0.9, "v041": 1.5}
_ANSWERS = {
    "v000": "I do not know much about that. Maybe you could ask somebody. Maybe you could ask somebody.",
    "v020": "The tide rises because the moon pulls at the sea.\nIt comes back about every twelve hours.",
    "v041": "The moon's pull raises the sea on the near side, and inertia on the far side:\n\n1. two high tides a "
    "day,\n2. about 12 h 25 min apart,\n3. highest at new and full moon.",
}
_QUESTIONS = (
    "Why are there tides?",
    "What makes the sea rise and fall?",
    "When is high tide?",
    "How far apart are tides?",
)


def written_config(root: Path, *overrides: str) -> RunConfig:
    """Make the configuration of the run."""
    return load("quickstart", [f"run.dir={root}", "run.name=tides", "rounds.iterations=20", *overrides])


def write_run(config: RunConfig, *, num_prompts: int = 40, answers: dict[str, str] | None = None) -> RunDirectory:
    """Write everything that a finished run of two rounds leaves.

    Args:
        config: The run's configuration.
        num_prompts: Held-out prompts.
        answers: Policy -> what it answers, in place of the usual.
    """
    directory = claim(config)
    texts = _ANSWERS | (answers or {})
    write_metrics(directory, num_rounds=2)
    for number in (1, 2):
        _write_round(directory, number)
    write_json(directory.evaluation, _evaluation(2))
    _write_lengths(directory, num_prompts)
    _write_reward_models(directory)
    _write_ladder(directory, num_prompts)
    _write_lineage(directory)
    directory.incidents.mkdir()
    incident = {
        "kind": "nonfinite",
        "what": "advantages <b>[3]</b> are nan",
        "policy_version": 31,
        "batch": "b.parquet",
        "reproduce": "rondo incident show <i>nonfinite</i>.json",
    }
    (directory.incidents / "nonfinite-r002-i000010.json").write_text(json.dumps(incident | {"api_key": "sk-hush"}))
    (directory.incidents / "nonfinite-r002-i000010.parquet").write_bytes(b"PAR1")
    state = RunState(phase=Phase.DONE, round=2, iteration=20, policy_version=41, reward_version=1, best_version=41)
    write_json(directory.state, state.to_json())
    write_json(directory.finished, state.to_json())
    store = PreferenceStore.open(f"sqlite:///{directory.preferences}")
    store.add_tasks(_tasks(num_prompts, texts))
    store.record_all(_labels(store), now=1.0)
    store.close()
    return directory


def write_metrics(directory: RunDirectory, *, num_rounds: int, num_iterations: int = 20) -> None:
    """Write metrics.jsonl and samples.jsonl."""
    rng = np.random.default_rng(1)
    with directory.metrics.open("w") as metrics, directory.samples.open("w") as sampled:
        for round_ in range(1, num_rounds + 1):
            for iteration in range(num_iterations):
                version = (round_ - 1) * 21 + iteration + 1
                line = _metrics_line(round_, iteration, share=iteration / max(1, num_iterations - 1), rng=rng)
                metrics.write(json.dumps(line | {"counter/policy_version": version}) + "\n")
                answer = {"key": "r1/i0/p#0", "prompt": "Why <em>now</em>?", "response": f"Because {version}."}
                numbers = {"score": 0.5, "kl_nats": 1.0, "reward": 0.4}
                sampled.write(json.dumps({"policy_version": version, "samples": [answer | numbers]}) + "\n")


def _metrics_line(round_: int, iteration: int, *, share: float, rng: np.random.Generator) -> dict[str, float]:
    noise = rng.normal(0, 1, 8)
    gain = 1 - math.exp(-3 * share)
    score = (1.3 + 0.3 * round_) * gain + 0.05 * noise[0]
    heldout = (1.15 + 0.25 * round_) * gain + 0.06 * noise[1]
    gold = -0.2 + (0.75 + 0.2 * round_) * gain - 0.12 * share**2 + 0.04 * noise[2]
    stages = [1.9 + 0.1 * noise[4], 0.35 + 0.02 * noise[5], 2.4 + 0.1 * noise[6], 0.06]
    return {
        "counter/round": round_,
        "counter/iteration": iteration,
        "objective/score": score,
        "objective/kl_k1_per_sequence": 9 * share**1.2 + 0.15 * noise[3],
        "score/heldout": heldout,
        "score/heldout_gap": score - heldout,
        "gold/gold": gold,
        "gold/helpfulness": gold + 0.2,
        "gold/harmlessness": gold - 0.2 + 0.3 * share,
        "policy/entropy": 1.4 - 0.5 * gain + 0.02 * noise[7],
        "policy/loss": 0.8 - 0.4 * gain,
        "rollout/response_tokens_mean": 24 + 8 * gain + 0.4 * noise[1],
        "rollout/repeated_3gram_fraction": 0.03 - 0.01 * gain + 0.002 * abs(noise[2]),
        "rollout/truncated_fraction": max(0.0, 0.02 - 0.02 * share + 0.004 * noise[3]),
        "rollout/tokens_per_s": 1900 + 40 * noise[0],
        **dict(zip(("time/generate", "time/score", "time/learn", "time/publish"), stages, strict=True)),
        "time/iteration": sum(stages) + 0.01,
        "busy/reward": 0.8 + 0.02 * noise[5],
    }


def _evaluation(number: int) -> dict[str, object]:
    before = {"score_mean": 0.01, "kl_k1_per_sequence": 0.02, "kl_k1_sem": 0.05, "response_tokens_mean": 24.6}
    after = {
        "score_mean": 1.2 + 0.3 * number,
        "kl_k1_per_sequence": 8.1,
        "kl_k1_sem": 0.4,
        "response_tokens_mean": 31.2,
    }
    rate = {1: (0.71, [0.66, 0.76]), 2: (0.8, [0.75, 0.85])}[number]
    return {
        "num_prompts": 256,
        "judge": "gold",
        "before": {"policy_version": 0, **before, "gold_mean": -0.21, "win_rate": 0.5},
        "after": {
            "policy_version": ENDS[number],
            **after,
            "gold_mean": 0.3 + 0.25 * number,
            "win_rate": rate[0],
            "win_rate_ci95": rate[1],
        },
    }


def _write_round(directory: RunDirectory, number: int) -> None:
    directory.round(number).mkdir(parents=True)
    write_json(directory.round(number) / "evaluation.json", _evaluation(number))
    alarm = "KL (nats a sequence) = 12.3 is above its bound of 12" if number == 2 else None
    report = RoundReport(
        round=number,
        policy_version=ENDS[number],
        reward_version=number - 1,
        best_version=ENDS[number],
        iterations=20,
        alarm=alarm,
        score_start=0.02,
        score_end=1.3 + 0.3 * number,
    )
    write_json(directory.round_report(number), report.to_json())
    why = {1: "the first one", 2: "gain in nll +0.041, 95% interval [+0.012, +0.070]; accuracy 0.802 -> 0.861"}[number]
    write_json(directory.refreshed(number), {"reward_version": number - 1, "why": why})
    constants = {"gain": 0.61, "bias": -0.12, "anchor": "ref_policy", "num_responses": 256, "prompts_sha256": "0"}
    write_json(directory.calibrations(number), {"reward_model": constants})


def _write_lengths(directory: RunDirectory, num_prompts: int) -> None:
    rng = np.random.default_rng(2)
    for version, mean in ((0, 24), (20, 28), (41, 31)):
        rollouts = [
            Rollout(
                key=RolloutKey(0, -1, f"p{place:03d}", 0),
                prompt=Prompt(prompt_id=f"p{place:03d}", token_ids=np.array([5, 6], np.int32), text="?"),
                response_ids=np.arange(length, dtype=np.int32),
                behavior_logprobs=np.zeros(length, np.float32),
                finish_reason="length" if length == 56 else "stop",
                policy_versions=PolicyVersions(version, version),
                worker="w0",
            )
            for place, length in enumerate(np.clip(rng.normal(mean, 8, num_prompts), 2, 56).astype(int).tolist())
        ]
        samples.write(directory.evaluation_of(version), rollouts)


def _write_reward_models(directory: RunDirectory) -> None:
    rng = np.random.default_rng(3)
    gaps: dict[str, np.ndarray] = {}
    for name, sharp, sources in (
        ("v000", 1.2, ("data.preferences",)),
        ("v000_heldout", 1.1, ("data.preferences",)),
        ("v001", 1.8, ("data.preferences", "round 2")),
        ("v001_heldout", 1.6, ("data.preferences", "round 2")),
    ):
        gaps[name] = rng.normal(sharp, 1.3, 400)
        scores = np.concatenate([gaps[name], np.zeros(400)])
        judged = validation_report(
            scores,
            better=np.arange(400),
            worse=np.arange(400, 800),
            response_tokens=(20 + 2 * scores + rng.normal(0, 5, 800)).astype(np.int64),
        )
        report: dict[str, object] = {
            "round": int(name[3]) + 1,
            "trained_on": "heldout" if "heldout" in name else "train",
            "num_train_pairs": 1800 * len(sources),
            "sources": {s: {"weight": 1.0, "num_train_prompts": 1800, "num_train_pairs": 1800} for s in sources},
            "heldout": {"num_prompts": 400, **judged},
            "heldout_by_source": {s: {"num_prompts": 400, **judged} for s in sources},
        }
        if name == "v001":
            gain = paired_gain(
                gaps["v001"], gaps["v000"], prompts=np.arange(400), metric="nll", confidence=0.95, resamples=200, seed=0
            )
            report["gate"] = {"incumbent": "v000", "pairs": "newest", **gain}
        path = directory.root / "reward_models" / name
        path.mkdir(parents=True)
        write_json(path / "reward_model_report.json", report)


def _write_ladder(directory: RunDirectory, num_prompts: int) -> None:
    rng = np.random.default_rng(4)
    comparisons = [
        Comparison(
            first=first,
            second=second,
            prompt_id=f"p{place:03d}",
            outcome=float(rng.random() < 1 / (1 + math.exp(_WORTH[second] - _WORTH[first]))),
            length_difference=float(rng.normal(4, 6)),
            judge="simulated",
            labeler="simulated-0",
            shown_first=first if rng.random() < 0.5 else second,
        )
        for first, second in (("v020", "v000"), ("v041", "v000"), ("v041", "v020"))
        for place in range(num_prompts)
    ]
    found = fit_ladder(comparisons, anchor="v000", bootstrap_resamples=200)
    alarm = Drift(version="v041", over="v020", predicted_elo=260.0, measured_elo=98.0, ci=(40.0, 158.0), alarm=True)
    fine = Drift(version="v041", over="v000", predicted_elo=270.0, measured_elo=255.0, ci=(190.0, 321.0), alarm=False)
    drift = [asdict(alarm), asdict(fine)]
    write_json(directory.ladder, {"best": "v041", "judge": "simulated", "drift": drift} | found.to_json())


def _write_lineage(directory: RunDirectory) -> None:
    made = (
        ("policies/v000", "policy", 0, (), {}),
        ("reward_models/v000", "reward_model", 1, ("policies/v000",), {"held-out accuracy": 0.802}),
        ("reward_models/v000_heldout", "reward_model", 1, ("policies/v000",), {"held-out accuracy": 0.797}),
        ("policies/v020", "policy", 1, ("policies/v000", "reward_models/v000"), {"iterations": 20}),
        ("rounds/r002/comparisons.jsonl", "comparisons", 2, ("policies/v020",), {"tasks": 500, "pairs": 3000}),
        (
            "reward_models/v001",
            "reward_model",
            2,
            ("policies/v000", "rounds/r002/comparisons.jsonl"),
            {"held-out accuracy": 0.861},
        ),
        ("policies/v041", "policy", 2, ("policies/v000", "reward_models/v001"), {"iterations": 20, "stopped": "KL"}),
    )
    for name, kind, round_, parents, data in made:
        lineage.note(
            directory.lineage,
            Artefact(name=name, kind=kind, round=round_, config="0123456789ab", parents=parents, data=data),  # pyright: ignore[reportArgumentType]
        )


def _tasks(num_prompts: int, texts: dict[str, str]) -> list[Task]:
    plan = [(1, "evaluation", "v020", "v000"), (2, "evaluation", "v041", "v000"), (2, "evaluation", "v041", "v020")]
    plan.append((2, "training", "v020", "v020"))
    return [
        Task(
            task_id=f"{purpose}-{round_}-{first}-{second}-{place:03d}",
            round=round_,
            kind="pair",
            purpose=purpose,  # pyright: ignore[reportArgumentType]
            prompt_id=f"p{place:03d}",
            prompt=_QUESTIONS[place % len(_QUESTIONS)],
            candidates=tuple(
                Candidate(candidate_id=f"c{side}", text=texts[name], policy=name, policy_version=int(name[1:]))
                for side, name in enumerate((first, second))
            ),
            overlap=2,
        )
        for round_, purpose, first, second in plan
        for place in range(num_prompts)
    ]


def _labels(store: PreferenceStore) -> list[Label]:
    """Two labelers, who call every tenth a tie and agree but for every seventh."""
    made: list[Label] = []
    for place, task in enumerate(store.tasks()):
        for number, labeler in enumerate(("ada", "ben")):
            differs = number == 1 and place % 7 == 0
            outcome = Outcome(verdict="preference", winner="c1" if (place % 4 == 3) != differs else "c0")
            if place % 10 == 9:
                outcome = Outcome(verdict="tie")
            made.append(
                Label(
                    label_id=f"{labeler}-{task.task_id}",
                    task_id=task.task_id,
                    labeler_id=labeler,
                    labeler_kind="person",
                    presented=("c0", "c1") if place % 2 else ("c1", "c0"),
                    outcome=outcome,
                    shown_at=100.0,
                    submitted_at=112.0,
                )
            )
    return made

"""Plain Hugging Face directories: what a run leaves behind for others to load, and what its own workers start from.

A directory is complete or not there: it is written beside its place, checked, and renamed into it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from learner import adapters
from learner.models import PolicyModel, ScalarModel, TrainedModel
from learner.training import GatherableNetwork, TrainingEngine
from protocol.files import sync, write_text

CALIBRATION = "rondo_calibration"
REWARD_MODEL_REPORT = "reward_model_report.json"
_NETWORK_PREFIX = "network."


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What is written of a network."""

    network: dict[str, Tensor]
    """By the names of a network without an adapter, merged where there is one."""
    adapter: dict[str, Tensor]
    """What is trained beside a frozen base, by the engine's names; empty without an adapter."""


def export_policy(engine: TrainingEngine, tokenizer: Any, directory: Path, *, card: Mapping[str, Any]) -> None:
    """Write a policy as a Hugging Face directory, from rank 0; all ranks must call it.

    Args:
        engine: Holds a `PolicyModel`.
        tokenizer: The policy's tokenizer, with its chat template.
        directory: Where to; must not exist.
        card: What the model card says: run, version, base, data, algorithm, metrics.

    Raises:
        FileExistsError: If the directory exists.
    """
    weights = _gathered(engine)
    if engine.context.rank == 0:
        policy: Any = engine.module
        write_policy(policy, tokenizer, directory, card=card, weights=weights)


def export_reward_model(
    engine: TrainingEngine,
    tokenizer: Any,
    directory: Path,
    *,
    card: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write a reward model as a Hugging Face directory, from rank 0; all ranks must call it.

    It becomes an `AutoModelForSequenceClassification` with one label, not calibrated yet.

    Args:
        engine: Holds a `ScalarModel`.
        tokenizer: The policy's tokenizer.
        directory: Where to; must not exist.
        card: What the model card says.
        report: What the validation found, kept beside the weights as reward_model_report.json.

    Raises:
        FileExistsError: If the directory exists.
    """
    weights = _gathered(engine)
    if engine.context.rank == 0:
        model: Any = engine.module
        write_reward_model(model, tokenizer, directory, card=card, report=report, weights=weights)


def write_policy(
    policy: PolicyModel,
    tokenizer: Any,
    directory: Path,
    *,
    card: Mapping[str, Any],
    weights: Weights | None = None,
) -> None:
    """Write a policy that this process holds, as `export_policy` does.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        directory: Where to; must not exist.
        card: What the model card says.
        weights: What was gathered of it; taken from the network by default.

    Raises:
        FileExistsError: If the directory exists.
    """
    with _complete_or_absent(directory) as staging:
        _save(policy, tokenizer, staging, weights=weights)
        _write_card(staging, card, task="text-generation", title=f"Policy {directory.name}")


def write_reward_model(
    model: ScalarModel,
    tokenizer: Any,
    directory: Path,
    *,
    card: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
) -> None:
    """Write a reward model that this process holds, as `export_reward_model` does.

    Args:
        model: The reward model.
        tokenizer: The policy's tokenizer.
        directory: Where to; must not exist.
        card: What the model card says.
        report: What the validation found, kept beside the weights.
        weights: What was gathered of it; taken from the network by default.

    Raises:
        FileExistsError: If the directory exists.
    """
    config = model.network.config
    config.pad_token_id = padding_id(tokenizer)
    config.problem_type = "regression"
    config.id2label, config.label2id = {0: "score"}, {"score": 0}
    if hasattr(config, CALIBRATION):  # inherited from the model it started from, whose scores had another unit
        delattr(config, CALIBRATION)
    with _complete_or_absent(directory) as staging:
        _save(model, tokenizer, staging, weights=weights)
        _write_card(staging, card, task="text-classification", title=f"Reward model {directory.name}")
        if report is not None:
            (staging / REWARD_MODEL_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def store_calibration(
    directory: Path, *, gain: float, bias: float, anchor: str, num_responses: int, prompts_sha256: str
) -> None:
    """Write a reward model's zero and unit into its config.json, in one atomic step.

        calibrated score = gain * raw score + bias

    Args:
        directory: The reward model's.
        gain: 1 / standard deviation of the anchor samples' scores.
        bias: Minus their mean, in standard deviations.
        anchor: Whose samples, such as `ref_policy`.
        num_responses: How many samples.
        prompts_sha256: Hash of the prompts that they answer.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CALIBRATION] = {
        "gain": gain,
        "bias": bias,
        "anchor": anchor,
        "num_responses": num_responses,
        "prompts_sha256": prompts_sha256,
    }
    write_text(path, json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")


def padding_id(tokenizer: Any) -> int:
    """Choose the padding token of a model.

    A sequence classifier reads the last token that is not padding. Where padding is the end token, it would look past
    the end of every finished response; any token that no response ends in will do.

    Args:
        tokenizer: The policy's tokenizer.

    Returns:
        A token id other than the end token's.
    """
    end = tokenizer.eos_token_id
    # An ordinary token last, for tokenizers that have the end token alone (GPT-2's).
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0):
        if token is not None and token != end:
            return int(token)
    return 1


def _gathered(engine: TrainingEngine) -> Weights:
    """Collect the weights by the network's names, and those of an adapter also apart from the others."""
    module: Any = engine.module
    plain = adapters.merged(engine)
    network = _kept(plain, list(plain.parameter_shapes()))
    tensors = {name.removeprefix(_NETWORK_PREFIX): tensor for name, tensor in network.items()}
    return Weights(network=tensors | _buffers(module.network), adapter=_kept(engine, adapters.trained_names(module)))


def _kept(engine: GatherableNetwork, names: Sequence[str]) -> dict[str, Tensor]:
    """Collect parameters one at a time; rank 0 keeps them, outside the accelerator."""
    shapes = engine.parameter_shapes()
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = engine.gather([name])[name]
        if tensor.shape != shapes[name]:  # a partition, or nothing: it would be written without a complaint
            raise RuntimeError(f"gathering {name} gave {tuple(tensor.shape)} instead of {tuple(shapes[name])}")
        if engine.context.rank == 0:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    return tensors


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    persistent = set(network.state_dict(keep_vars=True))
    return {name: buffer.detach().cpu() for name, buffer in network.named_buffers() if name in persistent}


def _save(model: TrainedModel, tokenizer: Any, staging: Path, *, weights: Weights | None) -> None:
    if weights is None:
        tensors = {name: p.detach() for name, p in model.network.named_parameters()} | _buffers(model.network)
        weights = Weights(network=tensors, adapter={})
    num_elements = sum(tensor.numel() for tensor in weights.network.values())
    # transformers knows the names and shards that others expect, tied weights included.
    model.network.save_pretrained(staging, state_dict=weights.network)
    tokenizer.save_pretrained(staging)
    _check_weights(staging, num_elements=num_elements)
    if weights.adapter:
        adapters.write(model, weights.adapter, staging)


def _check_weights(directory: Path, *, num_elements: int) -> None:
    """Count what was written, before anybody relies on it."""
    written = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            written += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    if written != num_elements:
        raise RuntimeError(f"{directory} holds {written} weights where the network has {num_elements}")


@contextmanager
def _complete_or_absent(directory: Path) -> Iterator[Path]:
    if directory.exists():
        raise FileExistsError(f"{directory} exists already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that died
    staging.mkdir()
    yield staging
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    staging.rename(directory)
    sync(directory.parent)


def _write_card(directory: Path, card: Mapping[str, Any], *, task: str, title: str) -> None:
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [rondo, rlhf]", "---", ""]
    lines += [f"# {title}", "", "Trained by Rondo.", ""]
    plain = {name: value for name, value in card.items() if not isinstance(value, Mapping)}
    sections = {"lineage": plain} | {name: value for name, value in card.items() if isinstance(value, Mapping)}
    for heading, rows in sections.items():
        if rows:
            lines += [f"## {heading.replace('_', ' ').capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {_spell(value)} |" for name, value in rows.items()] + [""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _spell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

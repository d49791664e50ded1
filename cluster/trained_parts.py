"""Whether the networks have the blocks and layers that the configuration wants to train, before any of them is loaded.

A policy from scratch is checked with the configuration, and a hub id when the learner loads it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from configs.models import ModelsConfig, TrainedPartConfig
from protocol.errors import UserError

_IN_A_BLOCK = re.compile(r"\.\d+\..*?(\w+)\.weight$")


def check(models: ModelsConfig) -> None:
    """Look into the directories that the configuration names.

    Args:
        models: What to start from and what to train of it.

    Raises:
        UserError: If one has fewer blocks than shall be trained, or none of a layer that shall be adapted.
    """
    for name, train, path in _networks(models):
        where = f"models.{name}.train"
        if train.last_blocks is not None:
            count = json.loads((path / "config.json").read_text(encoding="utf-8")).get("num_hidden_layers")
            if count is not None and train.last_blocks > count:
                raise UserError(
                    f"{path} has {count} transformer blocks",
                    where=f"{where}.last_blocks = {train.last_blocks}",
                    next_step=f"name at most {count}",
                )
        wanted = None if train.lora is None else train.lora.target_modules
        unknown = sorted(set(wanted) - (layers := linear_layers(path))) if wanted else []
        if unknown:
            raise UserError(
                f"{', '.join(unknown)} matches no layer in the blocks of {path}",
                where=f"{where}.lora.target_modules",
                next_step=f"choose from {', '.join(sorted(layers))}, or leave it out to adapt all linear ones",
            )


def _networks(models: ModelsConfig) -> Iterator[tuple[str, TrainedPartConfig, Path]]:
    """List what is trained and starts from a directory that is there."""
    policy = models.policy.path
    reward = policy if models.reward.init == "sft" else models.reward.init
    critic = {"policy": policy, "reward": reward}.get(models.critic.init, models.critic.init)
    for name, train, source in (
        ("policy", models.policy.train, policy),
        ("reward", models.reward.train, reward),
        ("critic", models.critic.train, critic),
    ):
        if source is not None and (Path(source) / "config.json").is_file():
            yield name, train, Path(source)


def linear_layers(directory: Path) -> set[str]:
    """Name the linear layers in the blocks of a network: those whose weights are matrices.

    Args:
        directory: The network's, with its weights as safetensors.
    """
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            matrices = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
            matches = [_IN_A_BLOCK.search(name) for name in matrices]
            found |= {match[1] for match in matches if match}
    return found

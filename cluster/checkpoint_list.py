"""A run's checkpoints for people: where each stands, whether it verifies, and which one a resume would use."""

import os
import time
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cluster.checkpoint import CheckpointError, committed, place_of, verify
from cluster.resumption import config_differences, is_foreign
from configs.run import RunConfig

_AGES = ((86_400, "d"), (3600, "h"), (60, "min"))


def table(root: Path, config: RunConfig) -> Table:
    """Verify and lay out all checkpoints, the newest first.

    Args:
        root: The run's `checkpoints/` directory.
        config: The run's configuration.
    """
    result = Table(title="Checkpoints", title_justify="left")
    for header in ("name", "round", "iteration", "policy", "size", "age", "", "verifies"):
        result.add_column(
            header,
            justify="right" if header in ("round", "iteration", "size", "age") else "left",
            no_wrap=header != "verifies",
        )
    used = False
    for number, directory in enumerate(reversed(committed(root))):
        place = place_of(directory.name)
        round, iteration = ("?", "?") if place is None else (str(place[0]), str(place[1]))
        marks = ["newest"] if number == 0 else []
        policy = "?"
        try:
            found = verify(directory)
        except CheckpointError as error:
            verdict = f"no: {str(error).replace(str(directory), directory.name)}"
        else:
            version = found.driver.get("state", {}).get("policy_version")
            policy = "?" if version is None else f"v{version:03d}"
            differing = config_differences(found, config)
            foreign = is_foreign(found)
            verdict = f"yes, but of another configuration: {'; '.join(differing[:4])}" if differing else "yes"
            if foreign:
                verdict = "yes, but not known to be of this run: see --trust-checkpoint"
            if not used:
                used = True  # a resume goes no further back than this, also where it then refuses
                marks.append("a resume refuses" if differing or foreign else "a resume uses it")
        size, age = decimal(_num_bytes(directory)), _age(time.time() - directory.lstat().st_mtime)
        cells = (directory.name, round, iteration, policy, size, age, ", ".join(marks), verdict)
        result.add_row(*map(Text, cells))
    return result


def _num_bytes(directory: Path) -> int:
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(directory) for name in names)


def _age(seconds: float) -> str:
    for unit_s, unit in _AGES:
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"

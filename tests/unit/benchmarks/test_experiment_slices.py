"""Every experiment of the laboratory, reduced to two minutes: it runs to its end and writes what it says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

FIRST_CLAIMS = {
    "algorithms": "APA over PPO",
    "lambda_sweep": "E1",
    "controller": "E2",
    "overoptimization": "E4",
    "selection": "dpo-0.1 over apa",
    "two_rewards": "linear, where no harm is at stake",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("slices")
    return base / "worlds", base / "results"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", list(FIRST_CLAIMS))
def test_slice(name: str, places: tuple[Path, Path]) -> None:
    worlds, results = places
    command = [sys.executable, "-m", f"benchmarks.experiments.{name}", "--slice"]
    command += ["--worlds", str(worlds), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    directory = results / name
    claims = json.loads((directory / "verdicts.json").read_text())
    assert claims[0]["name"] == FIRST_CLAIMS[name]
    assert all(claim["sentence"] in done.stdout for claim in claims)
    with (directory / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    raw = [path for path in (directory / "raw").glob("*.csv") if not path.name.startswith("grid-")]
    assert len(rows) == len(raw)
    assert {row["seed"] for row in rows} == {"1", "2"}
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")

"""`rondo label` on a run directory: the page that it opens and closes, and what goes in and out."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from configs.load import dump, load
from reward_service.preferences.store import PreferenceStore
from tests.integration.labeling_site import task


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose labels people give, with tasks that wait for them."""
    directory = tmp_path / "mine"
    directory.mkdir()
    people = ["rounds.labeler={kind: people}", "rounds.evaluation.labeler={kind: people}"]
    (directory / "config.yaml").write_text(dump(load("quickstart", [f"run.dir={tmp_path}", "run.name=mine", *people])))
    with closing(stored(directory)) as store:
        store.add_tasks([task(1), task(2)])
    return directory


def stored(run: Path) -> PreferenceStore:
    return PreferenceStore.open(f"sqlite:///{run / 'preferences.db'}")


@contextmanager
def serving(run: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run `rondo label serve` on a free port in a process of its own; yield it with what it said until it was open."""
    command = [sys.executable, "-m", "cluster.cli", "label", "serve", str(run), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            said: list[str] = []
            while not any("Ctrl-C closes it" in line for line in said):
                said.append(server.stdout.readline())
                assert said[-1], f"the server ended: {said}"
            yield server, said
        finally:
            server.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_the_page_and_nothing_else(run: Path, number: signal.Signals) -> None:
    with serving(run) as (server, _):
        server.send_signal(number)
        rest, _ = server.communicate(timeout=60)
    assert server.returncode == 0
    assert rest.splitlines()[-1] == "The labeling page is closed; every answer that it confirmed is in the store."
    assert not re.search("checkpoint|Traceback", rest)

"""`rondo label` on a run directory: the page that it opens and closes, and what goes in and out."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from configs.load import dump, load
from reward_service.preferences.exchange import export
from reward_service.preferences.records import Label, LabeledTask, Outcome
from reward_service.preferences.store import PreferenceStore
from tests.command_line import assert_refused, command
from tests.integration.labeling_site import task


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose labels people give, with tasks that wait for them."""
    directory = tmp_path / "mine"
    directory.mkdir()
    configure(directory)
    with closing(stored(directory)) as store:
        store.add_tasks([task(1), task(2)])
    return directory


def configure(run: Path, people: str = "{kind: people}") -> None:
    labelers = [f"rounds.labeler={people}", f"rounds.evaluation.labeler={people}"]
    (run / "config.yaml").write_text(dump(load("quickstart", [f"run.dir={run.parent}", "run.name=mine", *labelers])))


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


def links_in(said: list[str]) -> dict[str, str]:
    """Return name -> link, checking that each points at the page that was opened."""
    page = re.findall(r"Labeling page of mine: (http://\S+)", said[-1])[0]
    found = dict(re.findall(r"^link for (.+): (http://\S+)$", "".join(said), flags=re.MULTILINE))
    assert all(link.startswith(f"{page}/join/") for link in found.values())
    return found


def test_links_open_the_page_and_a_second_invitation_renews_the_first(run: Path) -> None:
    with serving(run, "--invite", "alex") as (_, said):
        old = links_in(said)
        assert list(old) == ["admin", "alex"]
        assert [httpx.get(link).status_code for link in old.values()] == [303, 303]
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        host, start = "127.0.0.1", "http://127.0.0.1:"
    else:
        host, start = "::1", "http://[::1]:"
    with serving(run, "--host", host, "--invite", "admin", "--invite", "Alex", "--invite", "bo") as (_, said):
        new = links_in(said)
        renewed = "renewed; the older one has stopped working"
        assert list(new) == [f"admin ({renewed})", f"alex ({renewed})", "bo"]
        page = said[-1].split()[4]
        assert page.startswith(start)
        assert [httpx.get(link).status_code for link in new.values()] == [303, 303, 303]
        again = [httpx.get(f"{page}/join/{link.rsplit('/', 1)[1]}").status_code for link in old.values()]
        assert again == [401, 401]
    with closing(stored(run)) as store:
        assert [(one.display_name, one.role) for one in store.labelers()] == [
            ("admin", "admin"),
            ("alex", "labeler"),
            ("bo", "labeler"),
        ]
    stats = command("label", "stats", str(run))
    assert re.search(r"alex +│ labeler +│ p-[0-9a-f]{12} +│ open", stats.out), stats.out


def test_a_run_that_has_not_begun_has_no_page(run: Path) -> None:
    (run / "preferences.db").unlink()
    configure(run, "{kind: people, guidelines: no-such-file}")
    ended = command("label", "serve", str(run), "--port", "0")
    assert (ended.code, ended.out) == (2, "")
    assert "no preference store" in ended.err
    assert not (run / "preferences.db").exists()


@pytest.mark.parametrize("reason", ["taken port", "public host", "address of a page", "missing guidelines"])
def test_a_page_that_does_not_open_invites_nobody(run: Path, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options, says = {
            "taken port": (["--port", str(taken.getsockname()[1])], "another port"),
            "public host": (["--port", "0", "--host", "0.0.0.0"], "can be reached from other machines"),
            "address of a page": (["--port", "0", "--public-url", "labels"], "is not the address of a page"),
            "missing guidelines": (["--port", "0"], "no-such-file"),
        }[reason]
        if reason == "missing guidelines":
            configure(run, "{kind: people, guidelines: no-such-file}")
        ended = command("label", "serve", str(run), "--invite", "alex", *options)
    assert (ended.code, ended.out) == (2, ""), ended
    assert says in ended.err
    with closing(stored(run)) as store:
        assert store.labelers() == []


def test_labels_of_a_round_that_is_over_or_never_comes_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "rounds" / "r001").mkdir(parents=True)
    (run / "rounds" / "r001" / "comparisons.jsonl").write_text("{}\n")
    own, rows = tmp_path / "own.jsonl", tmp_path / "rows.jsonl"
    for number, says in ((1, "round 1 of .* has learned from its comparisons already"), (3, "no round 3")):
        judged = task(9, round=number)
        label = Label(
            label_id="l9",
            task_id=judged.task_id,
            labeler_id="alex",
            labeler_kind="person",
            presented=("c9-0", "c9-1"),
            outcome=Outcome(verdict="preference", winner="c9-0"),
        )
        export([LabeledTask(task=judged, labels=(label,))], own, format="jsonl")
        pair = {"chosen": "So.", "rejected": "Not."}
        rows.write_text("".join(json.dumps(pair | {"prompt": f"Why {n}?", "round": n}) + "\n" for n in (2, number)))
        for path, format in ((own, "jsonl"), (rows, "trl-preference")):
            ended = command("label", "import", str(run), str(path), "--format", format, "--round", "2")
            assert_refused(ended, str(path))
            assert re.search(says, ended.err), ended.err
        with closing(stored(run)) as store:
            assert [(len(store.tasks()), store.labels())] == [(2, [])]
    # The default round 1 is over, but every row names its own.
    rows.write_text(json.dumps(pair | {"prompt": "Why?", "round": 2}) + "\n")
    ended = command("label", "import", str(run), str(rows), "--format", "trl-preference")
    assert (ended.code, "1 tasks and 1 labels are new" in ended.out) == (0, True), ended

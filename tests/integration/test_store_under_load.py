"""The preference store with fifty labelers at once, and with a process that dies while it writes."""

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import pytest

from reward_service.preferences.records import Candidate, Label, Outcome, Task, stable_id
from reward_service.preferences.store import Lease, PreferenceStore
from tests.postgres_server import new_database, postgres_server

NUM_PROCESSES, NUM_LABELERS_EACH = 2, 25
NUM_TASKS, OVERLAP = 1000, 2
START = multiprocessing.get_context("spawn")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
        return
    with postgres_server() as folder:
        yield new_database(folder)


def tasks(count: int, *, overlap: int) -> list[Task]:
    candidates = tuple(
        Candidate(candidate_id=name, text=f"answer {name}", policy="v000", policy_version=0) for name in "ab"
    )
    return [
        Task(
            task_id=f"t{number}",
            round=0,
            kind="pair",
            purpose="training",
            prompt_id=f"p{number}",
            prompt="Why?",
            candidates=candidates,
            overlap=overlap,
        )
        for number in range(count)
    ]


def judged(lease: Lease, labeler: str) -> Label:
    return Label(
        label_id=stable_id(lease.task.task_id, labeler),
        task_id=lease.task.task_id,
        labeler_id=labeler,
        labeler_kind="person",
        presented=lease.presented,
        outcome=Outcome(verdict="preference", winner="a"),
    )


def work(store: PreferenceStore, labeler: str, acknowledged: list[str], waits_s: list[float]) -> None:
    """Judge until nothing is left; every seventh label is sent twice, as after a lost answer."""
    while True:
        begun = time.monotonic()
        lease = store.next_task(labeler, now=time.time(), lease_s=600.0)
        if lease is None:
            return
        label = judged(lease, labeler)
        assert store.record(label, now=time.time(), lease_required=True)
        waits_s.append(time.monotonic() - begun)
        acknowledged.append(label.label_id)
        if len(acknowledged) % 7 == 0:
            assert not store.record(label, now=time.time(), lease_required=True)


def labelers(url: str, process: int, results: Connection) -> None:
    """Be half of the labelers."""
    acknowledged: list[list[str]] = [[] for _ in range(NUM_LABELERS_EACH)]
    waits_s: list[float] = []
    with closing(PreferenceStore.open(url)) as store:
        threads = [
            Thread(target=work, args=(store, f"p{process}-{number}", acknowledged[number], waits_s))
            for number in range(NUM_LABELERS_EACH)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    results.send(([one for given in acknowledged for one in given], waits_s))


def test_fifty_labelers_at_once_lose_and_double_nothing(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = tasks(NUM_TASKS, overlap=OVERLAP)
    pipes = [START.Pipe(duplex=False) for _ in range(NUM_PROCESSES)]
    processes = [START.Process(target=labelers, args=(url, number, sender)) for number, (_, sender) in enumerate(pipes)]
    with closing(PreferenceStore.open(url)) as store:
        store.add_tasks(wanted)
        begun = time.monotonic()
        for process in processes:
            process.start()
        results = [receiver.recv() for receiver, _ in pipes if receiver.poll(240)]
        taken_s = time.monotonic() - begun
        for process in processes:
            process.join(30)
        labels, progress = store.labels(standing_only=False), store.progress()
    acknowledged = [one for given, _ in results for one in given]
    assert len(acknowledged) == len(set(acknowledged)) == NUM_TASKS * OVERLAP
    assert {label.label_id for label in labels} == set(acknowledged)
    assert len(labels) == len(acknowledged)
    assert Counter(label.task_id for label in labels) == dict.fromkeys((one.task_id for one in wanted), OVERLAP)
    assert len({(label.task_id, label.labeler_id) for label in labels}) == len(labels)
    assert (progress.tasks, progress.done, progress.judgements) == (NUM_TASKS, NUM_TASKS, NUM_TASKS * OVERLAP)
    waits_s = sorted(wait for _, given in results for wait in given)
    with capsys.disabled():
        print(
            f"\n{url.split(':')[0]}: {len(labels)} submits in {taken_s:.1f} s (start of processes included); ask and "
            f"submit: median {waits_s[len(waits_s) // 2]:.3f} s, 99% {waits_s[len(waits_s) * 99 // 100]:.3f} s"
        )


def write_for_ever(url: str, run: int, acknowledgements: Connection) -> None:
    """Take and judge tasks, and say so after each."""
    with closing(PreferenceStore.open(url)) as store:
        number = 0
        while True:
            labeler = f"r{run}-{number}"
            lease = store.next_task(labeler, now=time.time(), lease_s=600.0)
            assert lease is not None
            label = judged(lease, labeler)
            store.record(label, now=time.time(), lease_required=True)
            acknowledgements.send(label.label_id)
            number += 1


def killed_after(url: str, run: int, seconds: float) -> list[str]:
    """Let a process write, kill it, and return what it had acknowledged."""
    receiver, sender = START.Pipe(duplex=False)
    process = START.Process(target=write_for_ever, args=(url, run, sender))
    process.start()
    sender.close()
    acknowledged = [receiver.recv()]
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    while True:
        try:
            acknowledged.append(receiver.recv())
        except EOFError:
            return acknowledged


def test_what_was_acknowledged_survives_sigkill(url: str, tmp_path: Path) -> None:
    generator = random.Random(7)
    acknowledged: list[str] = []
    with closing(PreferenceStore.open(url)) as store:
        store.add_tasks(tasks(6000, overlap=1))
    for run in range(5):
        acknowledged += killed_after(url, run, generator.uniform(0.05, 1.0))
        if url.startswith("sqlite"):
            with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with closing(PreferenceStore.open(url, create=False)) as store:
            labels, progress = store.labels(), store.progress()
        kept = {label.label_id for label in labels}
        assert set(acknowledged) <= kept
        # At most the one label a run that was committed when its process died, before it could say so.
        assert len(kept) - len(acknowledged) <= run + 1
        assert len(labels) == len({label.task_id for label in labels}) == progress.done
    assert len(acknowledged) > 10

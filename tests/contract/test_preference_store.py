"""What the preference store promises, for every database behind it."""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from protocol.errors import UserError
from reward_service.preferences.database import Database, file_system_of, is_network
from reward_service.preferences.exchange import read_import
from reward_service.preferences.records import Candidate, Label, Outcome, Progress, Task
from reward_service.preferences.schema import METADATA
from reward_service.preferences.store import LabelRefused, PreferenceStore, presented_order
from tests.postgres_server import new_database, postgres_server

A_WINS, B_WINS = Outcome(verdict="preference", winner="a"), Outcome(verdict="preference", winner="b")
TIE, BAD = Outcome(verdict="tie"), Outcome(verdict="both_bad")
SKIP, INVALID = Outcome(verdict="skip", reason="cannot say"), Outcome(verdict="invalid", reason="garbage")


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[], Path]]:
    """Start one server for all tests of the module, when the first asks for it."""
    with ExitStack() as stack:
        started: list[Path] = []

        def server() -> Path:
            if not started:
                started.append(stack.enter_context(postgres_server()))
            return started[0]

        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, servers: Callable[[], Path], tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else new_database(servers())


@pytest.fixture
def store(url: str) -> Iterator[PreferenceStore]:
    with closing(PreferenceStore.open(url)) as opened:
        yield opened


def task(number: int, **changes: object) -> Task:
    candidates = tuple(
        Candidate(
            candidate_id=name,
            # What a model may write: null characters, half characters, bidi controls.
            text=f"answer {name} \x00 \ud83d \u202e <script>",
            policy=f"v00{place}",
            policy_version=place,
            sampling={"temperature": 0.1},
            token_ids=(1, 2, 3),
            scores={"rm": -1.5},
        )
        for place, name in enumerate("ab")
    )
    fields = {"round": 0, "kind": "pair", "purpose": "training", "prompt": [{"role": "user", "content": "Why?\x00"}]}
    fields |= {"prompt_id": f"p{number}", "candidates": candidates, "metadata": {"topic": "water"}}
    return Task(**{"task_id": f"t{number}", **fields, **changes})  # pyright: ignore[reportArgumentType]


def label(name: str, *, of: str = "t1", by: str = "ann", says: Outcome = A_WINS, **changes: object) -> Label:
    fields = {"labeler_kind": "person", "presented": ("b", "a"), "ratings": {"a": 7}, "flags": {"b": ("untrue",)}}
    fields |= {"note": "because \x00", "shown_at": 10.25, "submitted_at": 12.5}
    values = {"label_id": name, "task_id": of, "labeler_id": by, "outcome": says, **fields, **changes}
    return Label(**values)  # pyright: ignore[reportArgumentType]


def refusal(store: PreferenceStore, wrong: Label, **how: bool) -> str:
    with pytest.raises(LabelRefused) as refused:
        store.record(wrong, now=20.0, **how)
    return refused.value.reason


def leased(store: PreferenceStore, labeler: str, *, now: float) -> str | None:
    found = store.next_task(labeler, now=now, lease_s=100.0)
    return None if found is None else found.task.task_id


def test_tasks_come_back_equal_and_in_their_order(store: PreferenceStore, url: str) -> None:
    tasks = [task(3), task(1, round=1), task(2, purpose="evaluation", overlap=2, expected="b")]
    assert store.add_tasks(tasks) == 3
    assert store.add_tasks([task(4), *tasks]) == 1
    assert store.add_tasks([]) == 0
    assert store.tasks() == [*tasks, task(4)]
    assert store.tasks(round=0) == [tasks[0], tasks[2], task(4)]
    assert store.tasks(round=0, purpose="evaluation") == [tasks[2]]
    assert store.task("t1") == tasks[1]
    with pytest.raises(KeyError):
        store.task("t9")
    with closing(PreferenceStore.open(url, create=False)) as again:
        assert again.tasks() == [*tasks, task(4)]


def test_a_different_task_under_the_same_id_changes_nothing(store: PreferenceStore) -> None:
    store.add_tasks([task(1)])
    with pytest.raises(UserError, match="a different task with the id t1"):
        store.add_tasks([task(2), task(1, prompt="other")])
    with pytest.raises(UserError, match="a different task with the id t3"):
        store.add_tasks([task(3), task(3, prompt="other")])
    assert store.tasks() == [task(1)]


def test_many_tasks_go_in_at_once(store: PreferenceStore) -> None:
    tasks = [task(number) for number in range(1201)]
    assert store.add_tasks(tasks) == 1201
    assert store.add_tasks(tasks) == 0
    assert [one.task_id for one in store.tasks()] == [f"t{number}" for number in range(1201)]


def test_a_label_comes_back_equal_and_once(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2)])
    assert store.record(label("l1"), now=20.0)
    assert not store.record(label("l1"), now=21.0)
    assert not store.record(label("l1", submitted_at=99.0), now=21.0), "a retry may carry another time"
    assert refusal(store, label("l1", says=B_WINS)) == "id_taken"
    assert store.labels() == [label("l1")]
    [labeled] = store.labeled()
    assert (labeled.task, labeled.labels) == (task(1), (label("l1"),))
    assert store.labels(labeler_id="bob") == []
    assert store.labels(round=1) == []
    assert store.labels(purpose="training") == [label("l1")]


def test_labels_that_break_a_rule_are_refused(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2)])
    store.record(label("l1"), now=20.0)
    assert refusal(store, label("l2", of="t9")) == "unknown_task"
    assert refusal(store, label("l2", by="bob", says=Outcome(verdict="preference", winner="c"))) == "does_not_fit"
    assert refusal(store, label("l2", by="bob")) == "at_overlap"
    assert refusal(store, label("l2")) == "already_judged"
    assert refusal(store, label("l2", supersedes="l9")) == "supersedes_unknown"
    assert refusal(store, label("l2", by="bob", supersedes="l1")) == "supersedes_other"
    assert refusal(store, label("l2", of="t2", supersedes="l1")) == "supersedes_other"
    assert refusal(store, label("l2", of="t2"), lease_required=True) == "no_lease"
    store.record(label("l2", says=B_WINS, supersedes="l1"), now=20.0)
    assert refusal(store, label("l3", supersedes="l1")) == "superseded_already"
    assert store.labels(standing_only=False) == [label("l1"), label("l2", says=B_WINS, supersedes="l1")]


def test_several_labels_are_recorded_together_or_not_at_all(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2)])
    with pytest.raises(LabelRefused):
        store.record_all([label("l1"), label("l2", of="t9")], now=20.0)
    assert store.labels() == []
    assert store.record_all([label("l1"), label("l2", of="t2"), label("l1")], now=20.0) == 2


def test_a_correction_and_an_undo_are_new_labels(store: PreferenceStore) -> None:
    store.add_tasks([task(1)])
    store.record(label("l1"), now=20.0)
    store.record(label("l2", says=TIE, supersedes="l1"), now=21.0, lease_required=True)
    assert store.last_label("ann") == label("l2", says=TIE, supersedes="l1")
    undo = label("l3", says=SKIP, supersedes="l2")
    store.record(undo, now=22.0)
    assert store.labels() == [undo]
    assert len(store.labels(standing_only=False)) == 3
    assert leased(store, "ann", now=23.0) is None, "whoever skipped a task is not asked again"
    assert leased(store, "bob", now=23.0) == "t1", "the place is free again"
    again = label("l4", says=B_WINS, supersedes="l3")
    assert refusal(store, again, lease_required=True) == "at_overlap", "bob holds the only place"
    store.release("bob", "t1")
    assert store.record(again, now=24.0, lease_required=True)
    assert leased(store, "bob", now=25.0) is None
    assert store.last_label("bob") is None


def test_a_closed_task_stays_closed_whatever_is_corrected(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2, overlap=2), task(3), task(4, round=1)])
    store.record_all([label("l1"), label("l2", of="t2")], now=20.0)
    store.close_open(round=0, purpose="training")
    # One that was done, one that lacked a judgement, and one that had none.
    store.record(label("l3", says=SKIP, supersedes="l1"), now=21.0)
    store.record(label("l4", of="t2", says=SKIP, supersedes="l2"), now=21.0)
    assert store.next_task("bob", now=22.0, lease_s=1.0, round=0) is None
    assert store.num_takeable(round=0) == 0
    assert refusal(store, label("l5", of="t3", by="bob")) == "at_overlap"
    progress = store.progress(round=0)
    assert (progress.tasks, progress.done, progress.judgements) == (3, 3, 0)
    assert leased(store, "bob", now=22.0) == "t4", "other rounds stay open"


def test_an_invalid_label_does_not_bar_a_later_judgement(store: PreferenceStore) -> None:
    store.add_tasks([task(1)])
    store.record(label("l1", says=INVALID), now=20.0)
    assert not store.record(label("l1", says=replace(INVALID, reason="silence")), now=20.0)
    assert leased(store, "ann", now=20.0) == "t1"
    assert store.record(label("l2"), now=21.0)
    assert [one.label_id for one in store.labels()] == ["l1", "l2"]


def test_a_high_water_mark_gives_the_store_as_it_was(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2)])
    assert store.high_water_mark() == 0
    store.record(label("l1"), now=20.0)
    mark = store.high_water_mark()
    assert mark == 1
    store.record(label("l2", says=TIE, supersedes="l1"), now=21.0)
    store.record(label("l3", of="t2"), now=21.0)
    assert store.labels(up_to=mark) == [label("l1")]
    assert [entry.labels for entry in store.labeled(up_to=mark)] == [(label("l1"),)]
    assert store.high_water_mark() == 3


def test_progress_counts_what_stands(store: PreferenceStore) -> None:
    store.add_tasks([task(n, overlap=2 if n == 1 else 1) for n in range(1, 7)] + [task(7, round=1)])
    store.record_all(
        [
            label("l1"),
            label("l2", by="bob", says=TIE),
            label("l3", of="t2", says=BAD),
            label("l4", of="t3", says=SKIP),
            label("l5", of="t4", says=INVALID),
            label("l6", of="t5"),
            label("l7", of="t5", says=SKIP, supersedes="l6"),
            label("l8", of="t7"),
        ],
        now=20.0,
    )
    counted = Progress(tasks=6, done=2, judgements=3, preferences=1, ties=1, both_bad=1, skips=2, invalid=1)
    assert store.progress(round=0, purpose="training") == counted
    assert store.progress().tasks == 7
    empty = Progress(tasks=0, done=0, judgements=0, preferences=0, ties=0, both_bad=0, skips=0, invalid=0)
    assert store.progress(purpose="check") == empty


def test_a_lease_is_kept_prolonged_and_given_back(store: PreferenceStore) -> None:
    store.add_tasks([task(1), task(2)])
    first = store.next_task("ann", now=100.0, lease_s=10.0)
    assert first is not None
    assert (first.task, first.leased_at, first.expires_at) == (task(1), 100.0, 110.0)
    assert first.presented == presented_order(task(1), "ann")
    again = store.next_task("ann", now=105.0, lease_s=10.0)
    assert again == replace(first, expires_at=115.0)
    assert store.lease("ann", now=114.0) == again
    assert store.lease("ann", now=115.0) is None
    assert leased(store, "bob", now=105.0) == "t2"
    assert leased(store, "cyd", now=105.0) is None
    store.release("bob", "t1")
    assert leased(store, "cyd", now=105.0) is None, "bob gave back what bob does not hold"
    store.release("bob", "t2")
    assert leased(store, "cyd", now=105.0) == "t2"


def test_an_expired_lease_frees_the_task_and_refuses_the_label(store: PreferenceStore) -> None:
    store.add_tasks([task(1)])
    lease = store.next_task("ann", now=0.0, lease_s=10.0)
    assert lease is not None
    late = label("l1", presented=lease.presented)
    assert refusal(store, late, lease_required=True) == "no_lease"
    assert leased(store, "bob", now=15.0) == "t1"
    assert refusal(store, late) == "at_overlap", "bob holds the only place"
    theirs = label("l2", by="bob", presented=presented_order(task(1), "bob"))
    assert store.record(theirs, now=16.0, lease_required=True)
    assert store.lease("bob", now=16.0) is None, "the label ends the lease"


def test_the_order_shown_must_be_the_one_given_out(store: PreferenceStore) -> None:
    store.add_tasks([task(1)])
    lease = store.next_task("ann", now=0.0, lease_s=100.0)
    assert lease is not None
    swapped = label("l1", presented=lease.presented[::-1])
    assert refusal(store, swapped, lease_required=True) == "does_not_fit"
    assert store.record(label("l1", presented=lease.presented), now=1.0, lease_required=True)


def test_the_least_labelled_tasks_come_first_and_checks_last(store: PreferenceStore) -> None:
    store.add_tasks(
        [task(1, purpose="check"), task(2, purpose="evaluation"), task(3, overlap=2), task(4, overlap=2, round=1)]
    )
    store.record(label("l1", of="t3", by="zoe"), now=0.0)
    order: list[str] = []
    for number in range(5):
        found = store.next_task("ann", now=float(number), lease_s=100.0)
        if found is not None:
            order.append(found.task.task_id)
            said = label(f"m{number}", of=found.task.task_id, presented=found.presented)
            store.record(said, now=float(number), lease_required=True)
    assert order == ["t4", "t3", "t2", "t1"]
    check = store.next_task("bob", now=9.0, lease_s=100.0, purpose="check")
    assert check is None, "ann has judged the only one"
    other = store.next_task("bob", now=9.0, lease_s=100.0, round=1)
    assert other is not None
    assert other.task.task_id == "t4"


def test_which_side_comes_first_is_even_and_depends_on_the_labeler() -> None:
    firsts = [presented_order(task(n), who)[0] for n in range(500) for who in ("ann", "bob")]
    assert 430 < firsts.count("a") < 570  # 4.4 standard deviations of a fair coin
    both = list(zip(firsts[::2], firsts[1::2], strict=True))
    assert 190 < sum(one != other for one, other in both) < 310


def test_labelers_are_known_by_their_token_alone(store: PreferenceStore) -> None:
    store.add_labeler("ann", display_name="Ann", token_hash="h1", now=1.0)
    store.add_labeler("bob", display_name="Bob", token_hash="h2", role="admin", now=2.0)
    for labeler_id, token_hash in (("ann", "h3"), ("cyd", "h1")):
        with pytest.raises(UserError, match="already"):
            store.add_labeler(labeler_id, display_name="Cyd", token_hash=token_hash, now=3.0)
    found = store.labeler_by_token_hash("h2")
    assert found is not None
    assert (found.labeler_id, found.display_name, found.role, found.disabled) == ("bob", "Bob", "admin", False)
    assert store.labeler_by_token_hash("h9") is None
    store.add_tasks([task(1)])
    assert leased(store, "ann", now=4.0) == "t1"
    store.disable_labeler("ann", now=5.0)
    assert store.labeler_by_token_hash("h1") is None
    assert store.lease("ann", now=5.0) is None
    assert [(one.labeler_id, one.disabled) for one in store.labelers()] == [("ann", True), ("bob", False)]
    with pytest.raises(UserError, match="no labeler eve"):
        store.disable_labeler("eve")


def test_a_name_is_one_person_whose_link_is_renewed(store: PreferenceStore) -> None:
    first = store.add_labeler("p-1", display_name="Ann Lee", token_hash="h1", role="admin", now=1.0)
    assert (first.labeler_id, first.role) == ("p-1", "admin")
    store.disable_labeler("p-1", now=2.0)
    again = store.add_labeler("p-2", display_name=" ann  LEE", token_hash="h2", now=3.0)
    assert again == first
    assert store.labelers() == [first]
    assert store.labeler_by_token_hash("h1") is None
    assert store.labeler_by_token_hash("h2") == first
    assert store.add_labeler("p-3", display_name="Ann", token_hash="h3", now=4.0).labeler_id == "p-3"


def test_the_audit_log_keeps_its_order(store: PreferenceStore) -> None:
    for number in range(3):
        store.audit("login", labeler_id="ann" if number else None, details={"n": number}, now=float(number))
    entries = store.audit_entries(last=2)
    assert [(entry.at, entry.event, entry.labeler_id, entry.details) for entry in entries] == [
        (1.0, "login", "ann", {"n": 1}),
        (2.0, "login", "ann", {"n": 2}),
    ]


@pytest.mark.parametrize("table", ["tasks", "labels", "audit"])
@pytest.mark.parametrize("change", ["UPDATE {} SET position = position + 7", "DELETE FROM {}"])
def test_the_database_itself_refuses_to_change_records(
    store: PreferenceStore, url: str, table: str, change: str
) -> None:
    store.add_tasks([task(1)])
    store.record(label("l1"), now=20.0)
    store.audit("login", labeler_id=None, details={}, now=1.0)
    database = Database(url, create=False)
    with pytest.raises(DBAPIError, match=f"{table} is append-only"), database.writing() as connection:
        connection.execute(text(change.format(table)))
    database.engine.dispose()
    assert store.labels() == [label("l1")]


def test_the_migrations_make_the_tables_that_the_code_knows(store: PreferenceStore, url: str) -> None:
    database = Database(url, create=False)
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    database.engine.dispose()


def test_tables_of_a_newer_version_are_left_alone(store: PreferenceStore, url: str) -> None:
    database = Database(url, create=False)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.engine.dispose()
    with pytest.raises(UserError, match="version 9999"):
        PreferenceStore.open(url)


def test_a_snapshot_is_whole(store: PreferenceStore, url: str, tmp_path: Path) -> None:
    store.add_tasks([task(1), task(2)])
    store.record_all([label("l1"), label("l2", says=TIE, supersedes="l1")], now=20.0)
    path = tmp_path / "deep" / "snapshot"
    store.snapshot(path)
    store.record(label("l3", of="t2"), now=30.0)
    if url.startswith("sqlite"):
        with closing(PreferenceStore.open(f"sqlite:///{path}", create=False)) as copy:
            tasks, labels = copy.tasks(), copy.labels(standing_only=False)
    else:
        tasks, labels = read_import(path.rename(path.with_suffix(".jsonl")), format="jsonl")
    assert tasks == [task(1), task(2)]
    assert labels == [label("l1"), label("l2", says=TIE, supersedes="l1")]
    assert [file.name for file in path.parent.iterdir() if file.name.endswith(".tmp")] == []


def test_a_store_that_is_not_there_is_said_to_be_missing(url: str) -> None:
    with pytest.raises(UserError, match="no preference store"):
        PreferenceStore.open(url, create=False)
    PreferenceStore.open(url).close()
    PreferenceStore.open(url, create=False).close()


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "mysql://u:secret@host/db", "preferences.db"])
def test_an_address_of_something_else_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="sqlite:///path") as refused:
        PreferenceStore.open(wrong)
    assert "secret" not in str(refused.value)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(UserError, match="cannot be opened") as refused:
        PreferenceStore.open("postgresql+psycopg://u:secret@127.0.0.1:1/db")
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("something else" * 1000)
    with pytest.raises(UserError, match="is damaged: file is not a database"):
        PreferenceStore.open(f"sqlite:///{path}")


def pragma(path: Path, name: str) -> object:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_sqlite_syncs_every_commit_to_its_log(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/store.db", create=True)
    with database.reading() as connection:
        found = [connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in ("synchronous", "foreign_keys")]
        wait_ms = connection.execute(text("PRAGMA busy_timeout")).scalar_one()
    database.engine.dispose()
    assert found == [2, 1]
    assert wait_ms == 60_000
    assert pragma(tmp_path / "store.db", "journal_mode") == "wal"


def test_on_a_network_file_system_there_is_a_warning_and_no_shared_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n")
    with caplog.at_level(logging.WARNING):
        database = Database(f"sqlite:///{tmp_path}/store.db", create=True, mounts=mounts)
    store = PreferenceStore(database)
    store.add_tasks([task(1)])
    assert store.record(label("l1"), now=1.0)
    store.close()
    assert "network file system (nfs4)" in caplog.text
    assert pragma(tmp_path / "store.db", "journal_mode") == "delete"


def test_the_innermost_mount_counts() -> None:
    mounts = "disk / ext4 rw 0 0\nnas /data nfs rw 0 0\nssd /data/fast\\040disk xfs rw 0 0\nme /home/me fuse.sshfs rw\n"
    found = [file_system_of(Path(path), mounts) for path in ("/tmp/a", "/data/a", "/data/fast disk/a", "/home/me/a/b")]
    assert found == ["ext4", "nfs", "xfs", "fuse.sshfs"]
    assert file_system_of(Path("/database"), mounts) == "ext4", "/data is not its mount point"
    assert [is_network(kind) for kind in found] == [False, True, False, True]
    assert [is_network(kind) for kind in ("lustre", "gpfs", "cifs", "smb3", "overlay", "tmpfs", "btrfs")] == [
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_audit_details_are_kept_as_json(tmp_path: Path) -> None:
    with closing(PreferenceStore.open(f"sqlite:///{tmp_path}/store.db")) as store:
        store.audit("refused", labeler_id="ann", details={"reason": "no_lease"}, now=1.0)
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        [(details,)] = connection.execute("SELECT details FROM audit").fetchall()
    assert json.loads(details) == {"reason": "no_lease"}

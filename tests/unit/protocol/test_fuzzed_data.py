"""Two hundred and more bad data files: each is refused in one message that names file and row, and writes nothing."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from configs.load import dump, load
from protocol.datasets import read_demonstrations, read_preferences, read_prompts
from protocol.errors import UserError
from reward_service.preferences.store import PreferenceStore
from tests.command_line import assert_refused, command
from tests.unit.protocol.bad_data import GOOD, BadFile, data_sets, lines, parquet, said, user
from tests.unit.protocol.bad_labels import LABEL, NATIVE, TASK, label_files

DATA, LABELS = list(data_sets()), list(label_files())


def test_there_are_more_than_two_hundred_different_ones() -> None:
    everything = [*DATA, *LABELS]
    assert len({bad.name for bad in everything}) == len(everything) >= 200
    assert len({(bad.content, bad.path, bad.format) for bad in everything}) == len(everything)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", DATA, ids=lambda bad: bad.name)
def test_a_bad_data_set_is_refused(bad: BadFile, here: Path) -> None:
    (here / bad.path).write_bytes(bad.content)
    before = sorted(here.rglob("*"))
    ended = command("data", "inspect", bad.path)
    for words in bad.says:
        assert_refused(ended, words)
    for read in (read_preferences, read_prompts, read_demonstrations):
        with pytest.raises(UserError) as error:
            list(read(bad.path))
        assert Path(bad.path).name in str(error.value)
    assert sorted(here.rglob("*")) == before


@pytest.fixture
def run(here: Path) -> Path:
    """A run directory with an empty store of preferences."""
    directory = here / "mine"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(load("quickstart", [f"run.dir={here}", "run.name=mine"])))
    PreferenceStore.open(_url(directory)).close()
    return directory


def _url(run: Path) -> str:
    return f"sqlite:///{run / 'preferences.db'}"


def _stored(run: Path) -> tuple[int, int]:
    with closing(PreferenceStore.open(_url(run), create=False)) as store:
        return len(store.tasks()), len(store.labels(standing_only=False))


@pytest.mark.parametrize("bad", LABELS, ids=lambda bad: bad.name)
def test_a_bad_file_of_labels_is_refused_and_nothing_is_added(bad: BadFile, run: Path) -> None:
    Path(bad.path).write_bytes(bad.content)
    ended = command("label", "import", str(run), bad.path, "--format", str(bad.format))
    for words in (bad.path, *bad.says):
        assert_refused(ended, words)
    assert _stored(run) == (0, 0)


def test_the_file_that_the_bad_ones_are_made_of_is_good(run: Path) -> None:
    Path("x.jsonl").write_bytes(NATIVE)
    assert command("label", "import", str(run), "x.jsonl").code == 0
    assert _stored(run) == (1, 1)
    # Files of before the first record told how many there are.
    Path("old.jsonl").write_bytes(lines({"record": "rondo-preferences", "version": 1}, TASK, LABEL))
    assert "0 tasks and 0 labels are new" in command("label", "import", str(run), "old.jsonl").out


def test_sources_that_are_no_files(here: Path) -> None:
    (here / "folder.jsonl").mkdir()
    (here / "empty").mkdir()
    os.mkfifo(here / "pipe.jsonl")
    (here / "around.jsonl").symlink_to("around.jsonl")
    for source in (
        "",
        "missing.jsonl",
        "./missing",
        "folder.jsonl",
        "./empty",
        "*.jsonl",
        "no-such/**/*.parquet",
        "pipe.jsonl",
        "around.jsonl",
        "~nobody-of-this-name/x.jsonl",
        "x" * 5000 + ".jsonl",
        "a\0b.jsonl",
        "/dev/null",
    ):
        assert_refused(command("data", "inspect", source), "there is no data file here")


def test_generators_that_are_none(here: Path) -> None:
    for source, says in (
        ("no.such.module:rows", "can not be imported"),
        ("json:no_such_name", "can not be imported"),
        ("json:__name__", "not a generator"),
    ):
        ended = command("data", "inspect", source)
        assert (ended.code, ended.out) == (2, "")
        assert says in ended.err


@pytest.mark.parametrize("option", ["--limit=0", "--limit=-1", "--max-tokens=0", "--limit=many"])
def test_limits_that_are_none(option: str, here: Path) -> None:
    (here / "x.jsonl").write_bytes(lines(GOOD))
    ended = command("data", "inspect", "x.jsonl", option)
    assert (ended.code, ended.out) == (2, "")
    assert option.partition("=")[0] in ended.err


def test_what_is_dropped_is_counted_and_shown(run: Path) -> None:
    Path("x.jsonl").write_bytes(lines(GOOD, GOOD | {"rejected": GOOD["chosen"]}, GOOD))
    inspected = command("data", "inspect", "x.jsonl")
    assert "2 of 3 rows kept; 1 dropped: chosen and rejected are identical (such as x.jsonl, line 2)" in inspected.out
    battle = {"question_id": "q", "model_a": "m", "model_b": "n", "winner": "tie", "judge": "j"}
    talk, other = [user("x"), said("a")], [user("x"), said("b")]
    good, parted = (
        {"conversation_a": talk, "conversation_b": other},
        {"conversation_a": talk, "conversation_b": talk[:1]},
    )
    Path("battles.jsonl").write_bytes(lines(battle | good, battle | parted))
    imported = command("label", "import", str(run), "battles.jsonl", "--format", "arena")
    assert "1 of 2 rows kept; 1 dropped: the conversations part before the last answer" in imported.out
    assert _stored(run) == (1, 1)


def test_a_row_of_megabytes_is_shown_in_part(here: Path) -> None:
    (here / "x.jsonl").write_bytes(lines({"prompt": "long " * 1_000_000}))
    ended = command("data", "inspect", "x.jsonl")
    assert ended.code == 0
    assert "(5000000 characters)" in ended.out
    assert len(ended.out) < 20_000


def test_checksums_show_that_a_value_was_changed(here: Path) -> None:
    """Without them a flipped letter is another text, and nobody could tell."""
    whole = parquet([GOOD] * 3)
    place = whole.index(b"What is a tide?")
    (here / "x.parquet").write_bytes(whole[:place] + b"w" + whole[place + 1 :])
    with pytest.raises(UserError, match="can not be read"):
        list(read_prompts("x.parquet"))

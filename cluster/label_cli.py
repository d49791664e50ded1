"""The commands around labels: the page for people, and what goes in and out of the preference store."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.console import CONSOLE
from configs.labels import PeopleConfig
from configs.load import ConfigError, load
from configs.run import RunConfig

if TYPE_CHECKING:
    from reward_service.preferences.store import PreferenceStore

_RunDir = Annotated[Path, typer.Argument(help="A run directory, such as runs/quickstart.", metavar="RUN")]
_FORMATS = ("jsonl", "parquet", "trl-preference", "trl-unpaired", "helpsteer3", "arena")
_Format = Annotated[str, typer.Option("--format", help=f"{', '.join(_FORMATS)}; the first two keep everything.")]
PRACTICE = "practice.db"


label_app = typer.Typer(no_args_is_help=True, help="Label comparisons, and look at or move labels.")


@label_app.command()
def serve(
    run: _RunDir,
    invite: Annotated[
        list[str] | None, typer.Option(help="Print a link for this person, a new one if they had one; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8600,
    public_url: Annotated[str | None, typer.Option(help="The https address of the proxy in front.")] = None,
    allow_public: Annotated[bool, typer.Option("--allow-public", help="Listen on a routable host.")] = False,
) -> None:
    """Open the labeling page of RUN.

    The first start prints a link for an admin, who invites labelers on the page. Links work once they are printed;
    nobody can register. A name is one person: to invite it again renews the link, and `--invite admin` that of the
    admin. Where the run's own labels come from a simulated labeler, a reward model or a judge, people label a copy of
    its tasks (practice.db) and the run stays as it is.

    Example: rondo label serve runs/quickstart --invite alex
    """
    from reward_service.labeling.people import invite as make_link
    from reward_service.labeling.server import Address
    from reward_service.labeling.server import serve as open_page

    config = _config(run)
    url, people = _for_people(run, config)

    def print_links(store: "PreferenceStore", base_url: str) -> None:
        has_admin = any(labeler.role == "admin" and not labeler.disabled for labeler in store.labelers())
        names = [*(invite or [])] if has_admin else ["admin", *(invite or [])]
        for name in dict.fromkeys(names):
            is_first = name == "admin" and not has_admin
            link = make_link(store, name, role="admin" if is_first else "labeler", base_url=base_url)
            renewed = " (renewed; the older one has stopped working)" if link.is_renewed else ""
            CONSOLE.print(f"link for {link.name}{renewed}: {link.url}", markup=False, highlight=False, soft_wrap=True)

    open_page(
        url,
        config=people,
        run_name=config.run.name,
        address=Address(host=host, port=port, allow_public=allow_public, public_url=public_url),
        secret_path=run.absolute() / "labeling.secret",
        ready=print_links,
    )


@label_app.command()
def export(
    run: _RunDir,
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    kind: _Format = "trl-preference",
    round: Annotated[int | None, typer.Option(help="Only this round's labels.")] = None,
) -> None:
    """Write RUN's labels to a file that others read.

    Example: rondo label export runs/quickstart preferences.jsonl --format trl-preference
    """
    from reward_service.preferences.exchange import export as write

    if output.exists():
        raise ConfigError(f"{output} exists; name another file")
    with _store(run) as store:
        everything = round is None
        found = write(store if everything else store.labeled(round=round), output, format=_format(kind, _FORMATS))
    CONSOLE.print(f"{output}: {found.summary()}", markup=False, highlight=False)


@label_app.command("import")
def import_labels(
    run: _RunDir,
    source: Annotated[Path, typer.Argument(help="The file to read.")],
    kind: _Format = "jsonl",
    round: Annotated[
        int, typer.Option(help="The round they belong to, where the file names none.", min=0, max=1_000_000)
    ] = 1,
) -> None:
    """Add labels from a file to RUN's store; those that are there already change nothing.

    Example: rondo label import runs/mine battles.json --format arena --round 2
    """
    from protocol.datasets import ReadReport
    from reward_service.preferences.exchange import read_import
    from reward_service.preferences.store import LabelRefused

    if not source.is_file():
        raise ConfigError(f"{source} is no file")
    report = ReadReport(source=str(source))
    tasks, labels = read_import(source, format=_format(kind, (*_FORMATS, "kwise")), round=round, report=report)
    _check_rounds(run, source, {task.round for task in tasks})
    with _store(run) as store:
        try:
            new_tasks, new_labels = store.add_labeled(tasks, labels, now=time.time())
        except LabelRefused as refused:
            raise ConfigError(f"{source}: nothing was added, because {refused}; correct or remove that label") from None
    CONSOLE.print(
        f"{source}: {report.summary()}; {new_tasks} tasks and {new_labels} labels are new",
        markup=False,
        highlight=False,
    )


@label_app.command()
def stats(run: _RunDir) -> None:
    """Say how far RUN's labeling is, how well labelers agree, and who was invited."""
    from cluster.label_stats import render

    with _store(run) as store:
        CONSOLE.print(render(store))
    practice = run.absolute() / PRACTICE
    if practice.is_file():
        CONSOLE.print(f"\nIn {PRACTICE}, where people label a copy of the run's tasks:", markup=False, highlight=False)
        with closing(_open(f"sqlite:///{practice}")) as store:
            CONSOLE.print(render(store))


def _format(name: str, known: Sequence[str]) -> Any:
    if name not in known:
        raise ConfigError(f"--format {name} is not known; it is one of {', '.join(known)}")
    return name


def _check_rounds(run: Path, source: Path, rounds: Iterable[int]) -> None:
    """Refuse labels that nothing would learn from, since the round is over or never comes."""
    from cluster.run_directory import RunDirectory

    count, directory = _config(run).rounds.count, RunDirectory(run.absolute())
    for number in sorted(rounds):
        if directory.comparisons(number).exists():
            why = f"round {number} of {run} has learned from its comparisons already"
        elif number > count:
            why = f"{run} has {count} rounds (rounds.count), and no round {number}"
        else:
            continue
        raise ConfigError(f"{source}: nothing was added, because {why}; name a later round, in the file or by --round")


def _for_people(run: Path, config: RunConfig) -> tuple[str, PeopleConfig]:
    """Choose the store that people label in, and what they are asked for."""
    from cluster.run_directory import RunDirectory, store_url

    url = store_url(config, RunDirectory(run.absolute()))
    plans = [config.rounds.of(number).labeler for number in range(1, config.rounds.count + 1)]
    for labeler in [*plans, config.rounds.evaluation.labeler]:
        if isinstance(labeler, PeopleConfig):
            _open(url).close()  # the page would make a store where there is none, as for a run that has not begun
            return url, labeler
    copy = f"sqlite:///{run.absolute() / PRACTICE}"
    with closing(_open(url)) as theirs, closing(_open(copy, create=True)) as ours:
        tasks = theirs.tasks()
        if not tasks:
            raise ConfigError(f"{run} has no tasks for labelers yet")
        ours.add_tasks(tasks)
    CONSOLE.print(
        f"the run's labels do not come from people; what is labelled here is kept in {run / PRACTICE} and changes "
        "nothing in the run",
        markup=False,
        highlight=False,
    )
    return copy, PeopleConfig()


@contextlib.contextmanager
def _store(run: Path) -> "Iterator[PreferenceStore]":
    from cluster.run_directory import RunDirectory, store_url

    with closing(_open(store_url(_config(run), RunDirectory(run.absolute())))) as store:
        yield store


def _open(url: str, *, create: bool = False) -> "PreferenceStore":
    from reward_service.preferences.store import PreferenceStore

    return PreferenceStore.open(url, create=create)


def _config(run: Path) -> RunConfig:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run directory: it has no config.yaml")
    return load(path)

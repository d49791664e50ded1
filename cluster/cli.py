"""The command line. Heavy imports wait until a command needs them, so that --help and --dry-run answer at once."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.exceptions
from rich.console import Console

from cluster.console import CONSOLE
from cluster.label_cli import label_app
from cluster.stopping import EXIT_RESUMABLE, STOPPING, Stopped
from configs.load import PRESETS, ConfigError, load
from configs.run import RunConfig

EXIT_FAILED, EXIT_USER = 1, 2

app = typer.Typer(
    name="rondo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Iterated online RLHF: from preferences to a policy that is measurably better.\n\n"
    "Start with [bold]rondo quickstart[/]: it trains a small language model end to end on this machine.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
ckpt_app = typer.Typer(no_args_is_help=True, help="List and verify checkpoints.")
workers_app = typer.Typer(no_args_is_help=True, help="Change who works on a run while it goes on.")
incident_app = typer.Typer(no_args_is_help=True, help="Look at what went wrong in a run.")
app.add_typer(data_app, name="data")
app.add_typer(workers_app, name="workers")
app.add_typer(ckpt_app, name="ckpt")
app.add_typer(incident_app, name="incident")
app.add_typer(label_app, name="label")

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
_ConfigArg = Annotated[str, typer.Argument(help="A YAML file, or a preset's name.", metavar="CONFIG")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print batch arithmetic and placement; start nothing.")]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Show the workers' own logs too.")]
_Trust = Annotated[
    bool,
    typer.Option("--trust-checkpoint", help="Go on from a checkpoint that another run wrote; it may run code."),
]
_FAULT_HELP = """Make something go wrong, to see what becomes of it: ROLE-INDEX:STATE:ACT[@ITERATION], such as
rollout-0:serving:kill@3. Roles are rollout, reward, reference, learner, driver; acts kill, stop, raise, pause=SECONDS,
slow=SECONDS, node."""
_RunDir = Annotated[Path, typer.Argument(help="A run directory, such as runs/quickstart.", metavar="RUN")]
_console = CONSOLE


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the contract's codes."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in argv
    argv = [argument for argument in argv if argument != "--traceback"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for room in ("actors", "cluster", "configs", "learner", "protocol", "reward_service"):
        logging.getLogger(room).setLevel(logging.INFO)
    STOPPING.listen()
    sys.exit(_guarded(lambda: app(argv, standalone_mode=False), traceback=traceback))


def _guarded(run: Callable[[], object], *, traceback: bool) -> int:
    """Turn every ending into an exit code and one clear message: the supervision boundary of the driver."""
    from protocol.errors import Resumable, UserError

    try:
        result = _unless_stopped(run)
        return result if isinstance(result, int) else 0
    except (ConfigError, UserError) as error:
        _error(str(error), error, traceback)
        return EXIT_USER
    except typer.exceptions.TyperException as error:
        error.show()  # pyright: ignore[reportAttributeAccessIssue] - every usage error has it
        return EXIT_USER
    except Resumable as error:
        _console.print(f"\n{error}", style="yellow", markup=False)
        return EXIT_RESUMABLE
    except (Stopped, KeyboardInterrupt, typer.Abort) as error:
        _console.print("\nstopped; the same command goes on from the last checkpoint", style="yellow")
        cause = error.__cause__
        if cause is not None and not isinstance(cause.__cause__, Stopped):
            _error(f"while it stopped: {type(cause).__name__}: {cause}", error, traceback)
        return EXIT_RESUMABLE
    except Exception as error:  # noqa: BLE001
        _error(f"{type(error).__name__}: {error}", error, traceback)
        return EXIT_FAILED


def _unless_stopped(run: Callable[[], object]) -> object:
    """Take whatever ends a run after a signal for the stop that the signal asked for.

    What its handler raises may come out of a library's C code as another exception, and a worker in the same terminal
    is interrupted too.
    """
    try:
        return run()
    except Exception as error:
        if STOPPING.asked:
            raise Stopped from error
        raise


def _error(message: str, error: BaseException, traceback: bool) -> None:
    stderr = Console(stderr=True, soft_wrap=True)
    stderr.print(f"error: {message}", style="red", markup=False, highlight=False)
    if traceback:
        import traceback as module

        stderr.print("".join(module.format_exception(error)), markup=False, highlight=False)
    elif not isinstance(error, ConfigError):
        stderr.print("(--traceback shows where it came from)", style="dim")


def _overrides(context: typer.Context) -> list[str]:
    """Read `a.b=c`, `--a.b c` and `--a.b=c` alike."""
    result: list[str] = []
    rest = list(context.args)
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("--")
        if "=" in word:
            result.append(name)
        elif word.startswith("--") and "." in name and rest:
            result.append(f"{name}={rest.pop(0)}")
        else:
            raise ConfigError(f"cannot read {word!r}; overrides are section.key=value or --section.key value")
    return result


def _train(
    config: RunConfig, *, dry_run: bool, verbose: bool, faults: Sequence[str] = (), trust_checkpoint: bool = False
) -> None:
    made: Sequence[Any] = ()
    if faults:
        from cluster.faults import parse

        made = [parse(text) for text in faults]
    if dry_run:
        from cluster.plan import render

        _console.print(render(config))
        return
    from cluster.launch import train as run

    run(config, _console, verbose=verbose, faults=made, trust_checkpoint=trust_checkpoint)


@app.command(context_settings=_OVERRIDES)
def quickstart(context: typer.Context, dry_run: _DryRun = False, verbose: _Verbose = False) -> None:
    """Train a small language model end to end on this machine, in a few minutes.

    Supervised fine-tuning, a reward model from comparisons, RL, and an evaluation before and after, through the same
    Ray, vLLM and DeepSpeed code that a cluster runs. The preset is configs/presets/quickstart.yaml; the result is kept
    in runs/quickstart, and a second call shows it.

    Example: rondo quickstart algorithm.name=ppo run.name=quickstart-ppo
    """
    _train(load("quickstart", _overrides(context)), dry_run=dry_run, verbose=verbose)


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: _ConfigArg,
    dry_run: _DryRun = False,
    verbose: _Verbose = False,
    fault: Annotated[list[str] | None, typer.Option(help=_FAULT_HELP, metavar="FAULT")] = None,
    trust_checkpoint: _Trust = False,
) -> None:
    """Train CONFIG, or go on with it where its run directory stands.

    Any value can be set on the command line, as a.b=c or --a.b c.

    Example: rondo train quickstart algorithm.name=ppo rollout.workers=2 --dry-run
    """
    wanted = load(config, _overrides(context))
    _train(wanted, dry_run=dry_run, verbose=verbose, faults=fault or (), trust_checkpoint=trust_checkpoint)


@app.command()
def resume(run: _RunDir, verbose: _Verbose = False, trust_checkpoint: _Trust = False) -> None:
    """Go on with a run from its newest checkpoint, under the configuration it was started with."""
    run = run.absolute()
    stored = _run_config(run)
    if load(stored).run.name != run.name:
        raise ConfigError(
            f"{run} was renamed: its config.yaml says run.name = {load(stored).run.name}; name it so again"
        )
    config = load(stored, [f"run.dir={run.parent}"])
    _train(config, dry_run=False, verbose=verbose, trust_checkpoint=trust_checkpoint)


@app.command(context_settings=_OVERRIDES)
def plan(context: typer.Context, config: _ConfigArg) -> None:
    """Print CONFIG's batch arithmetic and placement; start nothing."""
    _train(load(config, _overrides(context)), dry_run=True, verbose=False)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("rondo.yaml")) -> None:
    """Write a configuration to start from: the quickstart's, every line of it yours to change."""
    if path.exists():
        raise ConfigError(f"{path} exists; name another file")
    shutil.copy(PRESETS / "quickstart.yaml", path)
    _console.print(f"wrote {path}; next: rondo train {path} --dry-run", highlight=False)


@app.command()
def status(run: _RunDir) -> None:
    """Say how far a run is, from its files alone."""
    from cluster.status import describe

    config = load(_run_config(run))
    _console.print(describe(run, config))


@app.command()
def ladder(run: _RunDir) -> None:
    """Show the ladder of a run's policy versions: ratings with intervals, and who won how often against whom."""
    import json

    from cluster.tracking import ladder_table, wins_table

    _run_config(run)
    path = run / "ladder.json"
    if not path.exists():
        raise ConfigError(f"{run} has no ladder yet; a round ends with one (`rondo status {run}` says where it is)")
    found = json.loads(path.read_text())
    _console.print(ladder_table(found))
    _console.print(wins_table(found))


@app.command()
def report(run: _RunDir) -> None:
    """Write RUN/report.html: the whole run on one page that needs no network."""
    from contextlib import closing

    from cluster.report import write_report
    from cluster.run_directory import RunDirectory, store_url
    from reward_service.preferences.store import PreferenceStore

    config, directory = load(_run_config(run)), RunDirectory(run.absolute())
    if config.rounds.store_env is None and not directory.preferences.exists():
        path = write_report(directory, config, None)
    else:
        with closing(PreferenceStore.open(store_url(config, directory), create=False)) as store:
            path = write_report(directory, config, store)
    _console.print(f"report: {path}", highlight=False, markup=False)


@app.command()
def doctor() -> None:
    """Check that this machine can run Rondo: versions, memory, and how Ray would be exposed."""
    from cluster.doctor import examine

    findings = examine()
    for finding in findings:
        _console.print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}", markup=False, highlight=False)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command(context_settings=_OVERRIDES)
def submit(
    context: typer.Context,
    config: _ConfigArg,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
) -> None:
    """Submit CONFIG to a Ray cluster as a job and follow its log.

    The same as: ray job submit --address ADDRESS --working-dir . -- python -m cluster.cli train CONFIG ...
    but that `ray job stop` leaves the run cluster.deadlines.grace_s to commit in, not Ray's 3 s.
    With token authentication, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) are read by Ray.
    """
    from cluster.submit import submit as send

    overrides = _overrides(context)
    grace_s = load(config, overrides).cluster.deadlines.grace_s
    raise typer.Exit(send(config, overrides, grace_s=grace_s, address=address, console=_console))


@app.command()
def export(
    run: _RunDir,
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    version: Annotated[int | None, typer.Option(help="The policy version; the newest one if not given.")] = None,
) -> None:
    """Copy a policy version out of a run, as a plain Hugging Face directory."""
    from cluster.status import policies

    found = policies(run)
    if not found:
        raise ConfigError(f"{run} holds no policies yet")
    if version is not None and version not in found:
        raise ConfigError(f"{run} holds no policy version {version}; it has {', '.join(map(str, sorted(found)))}")
    if output.exists():
        raise ConfigError(f"{output} exists; name another directory")
    chosen = found[max(found) if version is None else version]
    staging = output.with_name(f".{output.name}.tmp")
    shutil.copytree(chosen, staging)
    os.replace(staging, output)
    _console.print(f"{chosen} -> {output}", highlight=False)


@ckpt_app.command("ls")
def ckpt_ls(run: _RunDir) -> None:
    """List a run's checkpoints: where each stands, whether it verifies, and which one a resume would use."""
    from cluster.checkpoint_list import table

    config = load(_run_config(run))
    _console.print(table(run / "checkpoints", config))


@ckpt_app.command("verify")
def ckpt_verify(
    run: _RunDir,
    name: Annotated[str | None, typer.Argument(help="One checkpoint's name; all of them if not given.")] = None,
) -> None:
    """Check every file of a run's checkpoints against its manifest; exit with 2 if any is damaged or there is none."""
    from cluster.checkpoint import CheckpointError, committed, verify

    _run_config(run)
    found = {directory.name: directory for directory in committed(run / "checkpoints")}
    if name is not None and name not in found:
        raise ConfigError(f"{run} holds no checkpoint {name}; it has {', '.join(found) or 'none'}")
    if not found:
        raise ConfigError(f"{run} has no checkpoints yet; `rondo status {run}` says where it is")
    failed = False
    for directory in found.values() if name is None else [found[name]]:
        try:
            verify(directory)
            _console.print(f"ok    {directory}", highlight=False, markup=False, soft_wrap=True)
        except CheckpointError as error:
            failed = True
            _console.print(f"FAIL  {error}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(EXIT_USER)


@workers_app.callback()
def workers() -> None:
    """Change who works on a run while it goes on."""


@workers_app.command("drain")
def workers_drain(
    name: Annotated[str, typer.Argument(help="A rollout worker, as in RUN/workers.json, such as rollout-2.")],
    run: Annotated[Path, typer.Option("--run", help="The run's directory.", metavar="RUN")],
) -> None:
    """Let a rollout worker leave a run: it finishes its batch, and its place is given back to the cluster.

    The run never has fewer than rollout.min_workers; if it would, it says so and goes on as it is.

    Example: rondo workers drain rollout-2 --run runs/quickstart
    """
    from cluster.elastic import ask_to_leave
    from cluster.run_directory import RunDirectory

    _run_config(run)
    ask_to_leave(RunDirectory(run), name)
    _console.print(f"{name} leaves {run} before the next version is published", highlight=False, markup=False)


@incident_app.command("show")
def incident_show(file: Annotated[Path, typer.Argument(help="A .json file of a run's incidents/.")]) -> None:
    """Show an incident, and of a failed reward the first responses it was asked about."""
    from cluster.incident_show import described

    _console.print(described(file), markup=False, highlight=False, soft_wrap=True)


@data_app.command("inspect")
def data_inspect(
    source: Annotated[str, typer.Argument(help="A .jsonl or .parquet file, a hub id, or package.module:callable.")],
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's directory, for lengths in tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Count what is longer than this.", min=1)] = None,
    limit: Annotated[int, typer.Option(help="Read at most so many rows.", min=1)] = 10_000,
) -> None:
    """Show what a data set is: detected type, examples, lengths, and what would be dropped or truncated and why."""
    from cluster.inspect import inspect, render

    _console.print(render(inspect(source, tokenizer=tokenizer, max_tokens=max_tokens, limit=limit)))


def _run_config(run: Path) -> Path:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run directory: it has no config.yaml")
    return path


if __name__ == "__main__":
    main()

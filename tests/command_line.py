"""The command line inside the test's own process, for cases too many to start a process for each."""

import contextlib
import io
import logging
import re
import signal
import time
from dataclasses import dataclass

from cluster import cli

NEXT_STEP = re.compile(r"Next: |; (check|correct|name|overrides are|set|write) |Presets by name|--help")
CPU_SECONDS, WALL_SECONDS = 4.0, 30.0
"""Bounds of a refusal: what it may compute, and what it may take on a machine that has other things to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    cpu_s: float
    wall_s: float


def command(*arguments: str) -> Ended:
    """Run `rondo ARGUMENTS` through its entry point, and put back what that changes in the process."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    levels = {name: logging.getLogger(name).level for name in ("actors", "cluster", "configs", "learner", "protocol")}
    cpu, wall = time.thread_time(), time.monotonic()
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(arguments)
    except SystemExit as ending:
        code = ending.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert isinstance(code, int)
    return Ended(
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
        cpu_s=time.thread_time() - cpu,
        wall_s=time.monotonic() - wall,
    )


def assert_refused(ended: Ended, says: str) -> None:
    """Check that a command ended as bad input must: code 2, one short message with what, where and what next."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err + ended.out
    assert ended.out == ""
    assert len(re.findall(r"^error: ", ended.err, flags=re.MULTILINE)) == 1, ended.err
    assert says in ended.err, ended.err
    assert NEXT_STEP.search(ended.err), ended.err
    assert len(ended.err) < 4000
    assert ended.cpu_s < CPU_SECONDS
    assert ended.wall_s < WALL_SECONDS

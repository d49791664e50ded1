"""The pages of docs/ as tests read them: their commands, their YAML, and whether the command line takes them."""

import re
import shlex
from pathlib import Path

from tests.command_line import command


def page(name: str) -> str:
    """Read a page of docs/."""
    return (Path(__file__).parents[1] / "docs" / name).read_text()


def commands(text: str) -> list[str]:
    """Find the lines `rondo ...` of a page, without that word."""
    return re.findall(r"^rondo (.+)$", text, flags=re.MULTILINE)


def snippets(text: str) -> list[str]:
    """Find the YAML blocks of a page."""
    return re.findall(r"^```yaml\n(.+?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def dry_run(line: str) -> str:
    """Give a page's command to the command line with --dry-run, and return what it prints."""
    ended = command(*shlex.split(line.removesuffix(" --dry-run")), "--dry-run")
    assert ended.code == 0, ended.err
    return ended.out

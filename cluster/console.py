"""Where the command line prints."""

import sys

from rich.console import Console

# A file or a job has no width of its own.
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)

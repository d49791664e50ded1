"""Rewrites cpu.lock and gpu.lock from cpu.in and gpu.in: run it, read the diff, run the tests.

python requirements/lock.py cpu        (on Linux x86-64 with CPython 3.11; pip must see the CPU build of torch)
python requirements/lock.py gpu        (resolves anywhere; cannot be run without CUDA)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# cpu.lock goes in with --no-deps, after torch; these would bring CUDA builds that cannot load next to a CPU torch.
LEFT_OUT = {"cpu": {"torch", "torchvision", "torchaudio", "torchcodec"}, "gpu": {"torch"}}
HEADER = {
    "cpu": "The complete CPU environment (CPython 3.11, Linux x86-64) with hashes. Made by requirements/lock.py.\n"
    "# torch goes in first, on its own, with its dependencies: see requirements/torch.txt. torchvision, torchaudio\n"
    "# and torchcodec are left out on purpose: text models need none of them, and what package indexes offer are\n"
    "# CUDA builds, next to which a CPU torch cannot import transformers or vllm. Install with --no-deps.",
    "gpu": "The complete CUDA environment (CPython 3.11, Linux x86-64) with hashes. Made by requirements/lock.py.\n"
    "# It resolves; it has not been run without a GPU. torch goes in first: see requirements/torch.txt.",
}


def main(kind: str) -> None:
    """Resolve requirements/KIND.in and write requirements/KIND.lock."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), "-r", str(HERE / f"{kind}.in")], check=True)
        installs = json.loads(report.read_text())["install"]
    lines: list[str] = []
    for item in installs:
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in LEFT_OUT[kind]:
            sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={item['metadata']['version']} --hash=sha256:{sha256}")
    (HERE / f"{kind}.lock").write_text(f"# {HEADER[kind]}\n" + "\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

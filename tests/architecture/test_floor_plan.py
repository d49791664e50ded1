"""The floor plan as data: which room may import what, and which library may be imported where."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("actors", "cluster", "configs", "learner", "protocol", "reward_service")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

MAY_IMPORT = {
    "cluster": {"actors", "cluster", "configs", "learner", "protocol", "reward_service"},
    "actors": {"actors", "configs", "protocol"},
    "reward_service": {"reward_service", "configs", "protocol"},
    "learner": {"learner", "configs", "protocol"},
    "protocol": {"protocol", "configs"},
    "configs": {"configs"},
}
# These know roles, not machines.
DRIVER_SIDE = ("cluster/driver.py", "cluster/rounds.py", "cluster/schedule.py")
DRIVER_MAY_IMPORT = {"configs", "protocol", "cluster.driver", "cluster.rounds", "cluster.schedule", "cluster"}

ONLY_IN = {
    "vllm": ("actors/engine.py", "actors/weight_receiver.py"),
    "deepspeed": ("learner/engine.py",),
    "ray": (
        "cluster/placement.py",
        "cluster/elastic.py",
        "cluster/faults.py",
        "cluster/generation.py",
        "cluster/pool.py",
        "cluster/stacks.py",
        "cluster/supervision.py",
        "cluster/rollout_pool.py",
        "cluster/scoring_pool.py",
        "cluster/learner_group.py",
        "cluster/launch.py",
        "cluster/submit.py",
        "cluster/cli.py",
        "*/worker.py",
    ),
    "peft": ("learner/adapters.py",),
    "transformers": ("learner/models.py", "reward_service/*_model.py", "protocol/tokens.py"),
    "torch": ("actors/*.py", "reward_service/*.py", "learner/*.py", "protocol/logprobs.py", "protocol/broadcast.py"),
    "pyarrow": ("protocol/data_files.py", "learner/records.py", "reward_service/preferences/*.py"),
    "datasets": ("protocol/datasets.py",),
    "fastapi": ("reward_service/labeling/*.py", "reward_service/preferences/*.py"),
    "sqlalchemy": ("reward_service/labeling/*.py", "reward_service/preferences/*.py"),
    "pydantic": ("configs/*.py", "reward_service/labeling/*.py"),
    "typer": ("cluster/cli.py", "cluster/label_cli.py"),
}
SAYS_NOTHING = {"utils", "helpers", "common", "misc"}


def imported(path: Path) -> set[str]:
    """All module names that a file imports, at its top or inside a function."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        # Names for annotations alone are no dependency at run time.
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor plan"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_arrow_points_down(name: str) -> None:
    room = name.split("/")[0]
    tops = {module.split(".")[0] for module in imported(ROOT / name)} & set(ROOMS)
    assert tops <= MAY_IMPORT[room], f"{name} imports {sorted(tops - MAY_IMPORT[room])}"


@pytest.mark.parametrize("name", DRIVER_SIDE)
def test_the_driver_knows_roles_not_machines(name: str) -> None:
    own = {module for module in imported(ROOT / name) if module.split(".")[0] in ROOMS}
    strangers = {
        m
        for m in own
        if not any(m == allowed or m.startswith(allowed + ".") for allowed in DRIVER_MAY_IMPORT - {"cluster"})
        and m != "cluster"
    }
    assert not strangers, f"{name} imports {sorted(strangers)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    strays = [
        name
        for name in NAMES
        if library in {module.split(".")[0] for module in imported(ROOT / name)}
        and not any(fnmatch(name, pattern) for pattern in ONLY_IN[library])
    ]
    assert not strays, f"{library} is imported in {strays}"


def test_module_names_say_something_and_shadow_nothing() -> None:
    stems = {Path(name).stem for name in NAMES} - {"__init__"}
    assert not stems & SAYS_NOTHING
    tops = {name.split("/")[0] for name in NAMES}
    assert not tops & set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=str)
def test_init_holds_a_docstring_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_modules_functions_and_argument_lists_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 80, f"{path}: {node.name}"
            arguments = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            assert len(arguments) + len(node.args.kwonlyargs) <= 8, f"{path}: {node.name} takes too many arguments"


@pytest.mark.parametrize("module", ["configs.load", "protocol.messages", "cluster.driver", "cluster.cli"])
def test_light_modules_pull_in_no_heavy_library(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = {{'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What no line of the program does: run code from a hub, read a pickle, or open itself to a network unasked."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("actors", "cluster", "configs", "learner", "protocol", "reward_service")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
READ_BY_PEOPLE = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")])
SETTINGS = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE", "ALLOW_RESET")
UNPICKLES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "torch.load"}
LOADERS = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_foreign_code_and_no_pickle(path: Path) -> None:
    for name, call in calls(path):
        assert name not in UNPICKLES, f"{path}:{call.lineno} reads a pickle"
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        trusted = given.get("trust_remote_code")
        assert trusted is None or ast.unparse(trusted) == "False", f"{path}:{call.lineno}"
        if name.split(".")[0] in LOADERS and name.endswith(".from_pretrained"):
            # Said at every place, or handed over in one mapping that says it.
            assert trusted is not None or None in given, f"{path}:{call.lineno} does not say whom it trusts"
    text = path.read_text()
    assert not re.search(r"""trust_remote_code["']?\s*[:=]\s*True""", text)
    for setting in SETTINGS:
        assert setting not in text


@pytest.mark.parametrize("path", [*SOURCES, *READ_BY_PEOPLE], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_listens_on_every_address_or_says_that_one_should(path: Path) -> None:
    text = path.read_text()
    assert "0.0.0.0" not in text
    assert not re.search(r"--(dashboard-)?host[= ]+(\*|::)", text)

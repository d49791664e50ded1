"""A model directory that brings code of its own is refused, and the code does not run."""

import json
from pathlib import Path

import pytest

from protocol.errors import UserError
from protocol.tokens import load_tokenizer
from reward_service.reference_model import ReferenceModel
from reward_service.reward_model import RewardModel
from tests.tiny import tiny_llama


def with_code(directory: Path, mark: Path, *, known: bool) -> Path:
    """Add classes that leave a mark when they are imported."""
    tiny_llama(directory)
    (directory / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n\nclass Evil:\n    pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config = json.loads((directory / "config.json").read_text())
    config |= {"auto_map": dict.fromkeys(classes, "evil.Evil"), "model_type": "llama" if known else "evil"}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    if not known:
        tokenizer["tokenizer_class"] = "Evil"
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.mark.parametrize("known", [False, True], ids=["an unknown kind", "a known kind"])
def test_code_in_a_model_directory_does_not_run(tmp_path: Path, known: bool) -> None:
    mark = tmp_path / "mark"
    directory = with_code(tmp_path / "model", mark, known=known)
    refused = 0
    for load in (load_tokenizer, ReferenceModel, RewardModel):
        try:
            load(str(directory), **({"temperature": 1.0} if load is ReferenceModel else {}))
        except UserError:
            refused += 1
    assert not mark.exists()
    # Of a known kind, the program's own classes read the weights; a policy is no reward model in any case.
    assert refused == (1 if known else 3)

"""Exports: complete Hugging Face directories that others load, or none at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.learner import LearnerConfig, OptimizerConfig
from learner import export
from learner.models import load_policy, load_scalar, scalar_from_policy
from tests.plain_engine import PlainEngine
from tests.tiny import END_ID, PAD_ID, tiny_llama, tiny_tokenizer

CARD = {
    "run": "night",
    "version": "v003",
    "base": "v000",
    "algorithm": "apa",
    "metrics": {"kl_k1_per_sequence": 1.2345678, "note": "a|b"},
}
IDS = torch.tensor([[5, 17, 300, 42, 9, 2, 77]])


def engine_over(module: torch.nn.Module) -> PlainEngine:
    return PlainEngine(module, optimizer=OptimizerConfig(), settings=LearnerConfig())


@pytest.mark.parametrize("tied", [False, True])
def test_a_policy_loads_as_a_causal_language_model(tied: bool, tmp_path: Path) -> None:
    policy = load_policy(tiny_llama(tmp_path / "base", tied=tied), precision="fp32")
    export.export_policy(engine_over(policy), tiny_tokenizer(), tmp_path / "policies" / "v003", card=CARD)
    directory = tmp_path / "policies" / "v003"
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, policy.network(IDS).logits)
    assert {path.name for path in directory.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert loaded.generation_config.eos_token_id == END_ID
    assert loaded.config.tie_word_embeddings is tied
    turns = [{"role": "user", "content": "hello"}]
    text = AutoTokenizer.from_pretrained(directory).apply_chat_template(turns, tokenize=False)
    assert text == tiny_tokenizer().apply_chat_template(turns, tokenize=False)


def test_the_card_tells_the_lineage(tmp_path: Path) -> None:
    policy = load_policy(tiny_llama(tmp_path / "base"), precision="fp32")
    export.write_policy(policy, tiny_tokenizer(), tmp_path / "v003", card=CARD)
    card = (tmp_path / "v003" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for words in ("| run | night |", "| base | v000 |", "## Metrics", "| kl_k1_per_sequence | 1.23457 |", "a\\|b"):
        assert words in card


def test_a_reward_model_loads_as_a_sequence_classifier(tmp_path: Path) -> None:
    model = scalar_from_policy(tiny_llama(tmp_path / "base"), seed=3)
    directory = tmp_path / "v000"
    report = {"heldout": {"accuracy": 0.75}}
    export.export_reward_model(engine_over(model), tiny_tokenizer(), directory, card=CARD, report=report)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == PAD_ID
    assert loaded.config.problem_type == "regression"
    padded = torch.tensor([[5, 17, 300, 42, END_ID, PAD_ID, PAD_ID], [5, 17, 300, 42, 9, 33, END_ID]])
    with torch.no_grad():
        scores = model(padded, torch.arange(7).expand(2, 7), torch.tensor([4, 13]))
        torch.testing.assert_close(loaded(padded).logits[:, 0], scores)
    assert json.loads((directory / export.REWARD_MODEL_REPORT).read_text()) == report


def test_calibration_is_stored_and_not_inherited(tmp_path: Path) -> None:
    model = scalar_from_policy(tiny_llama(tmp_path / "base"), seed=3)
    export.write_reward_model(model, tiny_tokenizer(), tmp_path / "v000", card={})
    before = json.loads((tmp_path / "v000" / "config.json").read_text())
    constants: dict[str, Any] = {"gain": 2.0, "bias": -0.5, "anchor": "ref_policy", "num_responses": 256}
    export.store_calibration(tmp_path / "v000", **constants, prompts_sha256="ab")
    after = json.loads((tmp_path / "v000" / "config.json").read_text())
    assert after.pop("rondo_calibration") == constants | {"prompts_sha256": "ab"}
    assert after == before
    assert not list((tmp_path / "v000").glob(".*"))

    again = load_scalar(tmp_path / "v000", precision="fp32")
    assert again.network.config.rondo_calibration["gain"] == 2.0
    export.write_reward_model(again, tiny_tokenizer(), tmp_path / "v001", card={})
    assert "rondo_calibration" not in json.loads((tmp_path / "v001" / "config.json").read_text())
    with pytest.raises(ValueError, match="JSON compliant"):
        export.store_calibration(tmp_path / "v000", **constants | {"gain": float("nan")}, prompts_sha256="ab")
    assert json.loads((tmp_path / "v000" / "config.json").read_text())["rondo_calibration"]["gain"] == 2.0


def test_padding_is_never_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    assert export.padding_id(tokenizer) == PAD_ID
    tokenizer.pad_token = "<|end|>"
    assert export.padding_id(tokenizer) != END_ID
    tokenizer.unk_token = "<|user|>"
    assert export.padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")


def test_an_export_is_complete_or_absent(tmp_path: Path) -> None:
    policy = load_policy(tiny_llama(tmp_path / "base"), precision="fp32")

    class NoTokenizer:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export.write_policy(policy, NoTokenizer(), tmp_path / "v001", card={})
    assert not (tmp_path / "v001").exists()
    export.write_policy(policy, tiny_tokenizer(), tmp_path / "v001", card={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "v001"]
    with pytest.raises(FileExistsError):
        export.write_policy(policy, tiny_tokenizer(), tmp_path / "v001", card={})


def test_half_gathered_weights_are_refused(tmp_path: Path) -> None:
    policy = load_policy(tiny_llama(tmp_path / "base"), precision="fp32")

    class Forgetful(PlainEngine):
        def gather(self, names: Any) -> Any:
            found = super().gather(names)
            return {name: tensor[:0] if "embed" in name else tensor for name, tensor in found.items()}

    engine = Forgetful(policy, optimizer=OptimizerConfig(), settings=LearnerConfig())
    with pytest.raises(RuntimeError, match="instead of"):
        export.export_policy(engine, tiny_tokenizer(), tmp_path / "v001", card={})
    assert not (tmp_path / "v001").exists()

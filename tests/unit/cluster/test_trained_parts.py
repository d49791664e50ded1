"""What cannot be trained is refused before anything starts, by looking into the models' directories."""

from pathlib import Path

import pytest

from cluster import trained_parts
from configs.models import ModelsConfig
from protocol.errors import UserError
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "policy")


@pytest.mark.parametrize("network", ["policy", "critic", "reward"])
def test_more_blocks_than_there_are(policy: Path, network: str) -> None:
    def models(blocks: int) -> ModelsConfig:
        sections: dict[str, dict[str, object]] = {"policy": {"path": str(policy)}}
        sections.setdefault(network, {})["train"] = {"last_blocks": blocks}
        return ModelsConfig.model_validate(sections)

    trained_parts.check(models(2))
    with pytest.raises(UserError, match="has 2 transformer blocks") as caught:
        trained_parts.check(models(3))
    assert f"models.{network}.train.last_blocks = 3" in str(caught.value)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "qkv", "proj", "input_layernorm"])
def test_layers_that_match_nothing(policy: Path, module: str) -> None:
    def models(*modules: str) -> ModelsConfig:
        lora = {"lora": {"target_modules": modules}}
        return ModelsConfig.model_validate({"policy": {"path": str(policy), "train": lora}})

    trained_parts.check(models("q_proj", "down_proj"))
    with pytest.raises(UserError, match=f"{module} matches no layer in the blocks"):
        trained_parts.check(models("q_proj", module))


def test_linear_layers_are_those_in_the_blocks(policy: Path) -> None:
    found = trained_parts.linear_layers(policy)
    assert sorted(found) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_hub_id_is_left_to_whoever_loads_it() -> None:
    policy = {"path": "somebody/some-model", "train": {"last_blocks": 1000}}
    trained_parts.check(ModelsConfig.model_validate({"policy": policy}))

"""Two rounds with adapters on the real stack: policy, critic and reward model, published both ways and gone on from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rondo_process import metrics_of, train_tiny

ADAPTERS = (
    "models.policy.train.lora={rank: 4, alpha: 8}",
    "models.critic.train.lora.rank=4",
    "models.reward.train.lora.rank=4",
    "learner.policy_optimizer.learning_rate=1e-2",
    "rounds.count=2",
    "rounds.init_policy=current",
    "rounds.iterations=2",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("publish", ["merged", "adapter"])
def test_two_rounds_train_one_adapter_on_one_base(publish: str, tmp_path: Path) -> None:
    run = train_tiny(tmp_path, *ADAPTERS, f"rollout.publish={publish}", timeout_s=890)
    lines = metrics_of(run)
    assert len(lines) == 4
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert line["sync/logprob_gap_max"] < 1e-4
    first, *later = sorted((run / "policies").iterdir())
    base = load_file(first / "model.safetensors")
    assert not (first / "adapter").exists()
    whole = sum(weight.numel() * weight.element_size() for weight in base.values())
    # Rank 4 in fp32, of two blocks with seven layers each, whose rows and columns add up to 832.
    sent = {"merged": whole, "adapter": 2 * 4 * 832 * 4}[publish]
    assert all(line["sync/bytes"] == pytest.approx(sent, rel=0.01) for line in lines)
    assert publish == "merged" or whole > 10 * sent
    assert len(later) == 2
    for policy in later:
        settings = json.loads((policy / "adapter" / "adapter_config.json").read_text())
        assert (settings["r"], settings["base_model_name_or_path"]) == (4, "../../v000")
        adapter = load_file(policy / "adapter" / "adapter_model.safetensors")
        weights = load_file(policy / "model.safetensors")
        for name, weight in weights.items():
            stem = "base_model.model." + name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" not in adapter:
                assert torch.equal(weight, base[name])
                continue
            a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
            torch.testing.assert_close(weight, base[name] + 2.0 * (b @ a))
            assert b.any()
    assert (run / "reward_models" / "v001" / "adapter").is_dir() or (
        run / "reward_models" / "v000" / "adapter"
    ).is_dir()

"""An adapter is trained beside a frozen base; merged, exported, reloaded and switched off it is what it says it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from configs.algorithm import PPOConfig
from configs.learner import LearnerConfig, OptimizerConfig
from configs.models import LoraConfig, TrainedPartConfig
from learner import adapters, export, weight_sender
from learner.experience import PassSettings
from learner.models import PolicyModel, TrainedModel, load_policy, scalar_from_policy
from learner.update import Updater, UpdateSettings
from protocol.errors import UserError
from protocol.weights import WeightManifest
from reward_service.reference_model import ReferenceModel
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import PlainEngine
from tests.tiny import tiny_llama, tiny_tokenizer

LORA = TrainedPartConfig(lora=LoraConfig(rank=4, alpha=12.0))
RATE = OptimizerConfig(learning_rate=1e-2)
IDS = torch.tensor([[5, 17, 300, 42, 9, 2, 77, 130, 8, 61]])


def engine_over(module: torch.nn.Module, **settings: Any) -> PlainEngine:
    return PlainEngine(module, optimizer=RATE, settings=LearnerConfig(**settings))


def logprobs(model: PolicyModel, ids: Tensor = IDS) -> Tensor:
    positions = torch.arange(ids.shape[1])
    with torch.no_grad():
        return model(ids, positions[None], positions[:-1], ids[0, 1:])[0]


def logprobs_of(network: Any, ids: Tensor = IDS) -> Tensor:
    """Compute them independently, in float64."""
    with torch.no_grad():
        every = torch.log_softmax(network(input_ids=ids).logits[0].double(), dim=-1)
    return every[:-1].gather(-1, ids[0, 1:, None])[:, 0].float()


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learned(engine: PlainEngine, steps: int = 3) -> None:
    """Take a few steps, so that B is not zero any more."""
    positions = torch.arange(10)
    for _ in range(steps):
        if isinstance(engine.module, PolicyModel):
            found, _ = engine.forward(IDS, positions[None], positions[:-1], IDS[0, 1:])
        else:
            found = engine.forward(IDS, positions[None], positions)
        engine.backward(-found.sum(), last=True)
        engine.step()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "policies" / "v000")


def trained(base: Path, train: TrainedPartConfig = LORA) -> PlainEngine:
    engine = engine_over(adapters.open_policy(base, train, precision="fp32", seed=1))
    learned(engine)
    return engine


def test_an_adapter_begins_as_nothing_and_is_the_same_for_the_same_seed(base: Path) -> None:
    plain = load_policy(base, precision="fp32")
    first, again, other = (adapters.open_policy(base, LORA, precision="fp32", seed=s) for s in (1, 1, 2))
    assert torch.equal(logprobs(first), logprobs(plain))
    ours, theirs, others = (copies(policy) for policy in (first, again, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    different = {name for name in ours if not torch.equal(ours[name], others[name])}
    assert different == {name for name in ours if ".lora_A." in name}


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_an_update_changes_the_adapter_alone_and_a_critic_s_head(kind: str) -> None:
    policy, critic = tiny_policy(), tiny_critic()
    for model in (policy, critic):
        adapters.choose(model, LORA, seed=1, where="models")
    before = {"policy": copies(policy), "critic": copies(critic)}
    updater = Updater(
        policy=engine_over(policy),
        critic=engine_over(critic),
        settings=UpdateSettings(
            algorithm=PPOConfig(minibatch_responses=6, num_epochs=2),
            passes=PassSettings(temperature=0.8, token_budget=70, layout="sorted", pad_id=0),
            max_response_tokens=24,
            run_seed=5,
        ),
    )
    report = updater.update(scored_batch())
    assert report.metrics["policy/grad_norm"] > 0
    model = {"policy": policy, "critic": critic}[kind]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[kind][n])}
    expected = {n for n in before[kind] if ".lora_" in n or (kind == "critic" and n == "network.score.weight")}
    assert changed == expected
    assert len(changed) == 2 * 2 * 7 + (kind == "critic")


def test_only_the_blocks_below_the_last_are_frozen(base: Path) -> None:
    untouched = copies(load_policy(base, precision="fp32"))
    engine = trained(base, TrainedPartConfig(last_blocks=1))
    for name, parameter in engine.module.named_parameters():
        frozen = name.startswith("network.model.layers.0.")
        assert torch.equal(parameter, untouched[name]) == frozen, name
        assert (parameter.grad is None) or not frozen
    engine = trained(base, TrainedPartConfig(last_blocks=2))
    assert all(not torch.equal(p, untouched[n]) for n, p in engine.module.named_parameters())


def test_switched_off_it_is_the_reference(base: Path) -> None:
    policy: Any = trained(base).module
    responses = [np.array([300, 42, 9, 2, 77, 130, 8, 61], np.int32)]
    reference = ReferenceModel(str(base), temperature=1.0, dtype="float32", device="cpu", micro_batch_tokens=512)
    [expected] = reference.logprobs([np.array([5, 17], np.int32)], responses)
    on = logprobs(policy)
    with adapters.switched_off(policy):
        off = logprobs(policy)
    assert np.abs(off.numpy()[1:] - expected).max() <= 1e-6
    assert torch.equal(logprobs(policy), on)
    assert (on - off).abs().max() > 1e-2
    assert all(p.requires_grad == (".lora_" in n) for n, p in policy.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_trained_adapter_merged_export_and_peft_agree(tied: bool, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "policies" / "v000", tied=tied)
    engine = trained(base)
    policy: Any = engine.module
    directory = tmp_path / "policies" / "v003"
    export.export_policy(engine, tiny_tokenizer(), directory, card={})
    expected = logprobs(policy)

    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in AutoModelForCausalLM.from_pretrained(base).named_parameters()
    }
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory / "adapter"))
    assert (logprobs_of(loaded) - expected).abs().max() < 1e-4
    assert (logprobs_of(with_adapter) - expected).abs().max() < 1e-4
    assert (logprobs_of(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 1e-2
    assert json.loads((directory / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "../../v000"
    )


def test_what_is_published_is_what_is_exported_bit_for_bit_and_as_often_as_asked(base: Path, tmp_path: Path) -> None:
    engine = trained(base)
    before = copies(engine.module)
    streams = [
        list(weight_sender.publish(engine, policy_version=7, bucket_bytes=50_000, dtype="float32")) for _ in range(2)
    ]
    *buckets, manifest = streams[0]
    assert isinstance(manifest, WeightManifest)
    assert manifest == streams[1][-1]
    export.export_policy(engine, tiny_tokenizer(), tmp_path / "v003", card={})
    exported = load_file(tmp_path / "v003" / "model.safetensors")
    plain = load_policy(base, precision="fp32")
    assert [slot.spec.name for slot in manifest.slots] == [name for name, _ in plain.network.named_parameters()]
    for slot in manifest.slots:
        raw = buckets[slot.bucket][slot.offset : slot.offset + slot.spec.num_bytes]
        sent = torch.frombuffer(raw.copy(), dtype=torch.float32).reshape(slot.spec.shape)
        assert torch.equal(sent, exported[slot.spec.name])
        layer = "network." + slot.spec.name.removesuffix(".weight")
        if slot.spec.name.endswith("_proj.weight"):
            a, b = (before[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            slow = before[f"{layer}.base_layer.weight"] + 12.0 / 4 * sum(torch.outer(b[:, r], a[r]) for r in range(4))
            torch.testing.assert_close(sent, slow)
        else:
            assert torch.equal(sent, before[f"{layer}.weight"])
    assert all(torch.equal(p, before[n]) for n, p in engine.module.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_alone_is_sent_multiplied_and_summed_together_with_its_base(
    tied: bool, dtype: str, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "policies" / "v000", tied=tied)
    engine = trained(base)
    alone = adapters.Alone(engine)
    *buckets, manifest = weight_sender.publish(alone, policy_version=7, bucket_bytes=3_000, dtype=dtype)
    assert isinstance(manifest, WeightManifest)
    words = {"float32": np.uint32, "bfloat16": np.uint16}[dtype]
    total = 0
    for parameter in load_policy(base, precision="fp32").network.parameters():  # tied ones once
        bits = parameter.detach().to(getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy().view(words)
        total += sum(int(word) for word in bits)
    for slot in manifest.slots:
        raw = buckets[slot.bucket][slot.offset : slot.offset + slot.spec.num_bytes]
        total += sum(int(word) for word in raw.view(words))
        sent = torch.frombuffer(raw.copy(), dtype=getattr(torch, dtype)).reshape(slot.spec.shape)
        layer, _, part = slot.spec.name.removesuffix(".weight").rpartition(".")
        tensor = engine.module.get_parameter(f"network.{layer}.{part}.default.weight").detach()
        factor = {"lora_A": 1.0, "lora_B": 12.0 / 4}[part]
        assert torch.equal(sent, (tensor * factor).to(sent.dtype))
    assert len(manifest.slots) == 2 * 2 * 7
    assert len(buckets) > 2
    assert manifest.loaded_checksum == total % 2**64
    # The base is frozen: what it sums to is not gathered again.
    gathered: list[str] = []
    gather = engine.gather
    engine.gather = lambda names: gathered.extend(names) or gather(names)
    again = list(weight_sender.publish(alone, policy_version=7, bucket_bytes=3_000, dtype=dtype))
    assert again[-1] == manifest
    assert {name for name in gathered if ".lora_" not in name} == set()


def test_the_next_round_goes_on_with_the_adapter_on_the_same_base(base: Path, tmp_path: Path) -> None:
    engine = trained(base)
    directory = base.parent / "v003"
    export.export_policy(engine, tiny_tokenizer(), directory, card={})
    moved = tmp_path / "elsewhere"
    base.parent.rename(moved)
    again = adapters.open_policy(moved / "v003", LORA, precision="fp32", seed=9)
    ours, theirs = copies(engine.module), copies(again)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Who trains all of it starts from the merged weights.
    whole = adapters.open_policy(moved / "v003", TrainedPartConfig(), precision="fp32", seed=9)
    assert (logprobs(whole) - logprobs(again)).abs().max() < 1e-4
    assert not any(".lora_" in name for name in copies(whole))
    for change in ({"rank": 8}, {"alpha": 4.0}, {"target_modules": ("q_proj",)}):
        other = TrainedPartConfig(lora=LoraConfig(**{"rank": 4, "alpha": 12.0} | change))
        with pytest.raises(UserError, match="rank 4, alpha 12"):
            adapters.open_policy(moved / "v003", other, precision="fp32", seed=9)


def test_a_reward_model_s_adapter_holds_its_head(base: Path, tmp_path: Path) -> None:
    model = scalar_from_policy(base, seed=3)
    adapters.choose(model, LORA, seed=1, where="models.reward.train")
    engine = engine_over(model)
    learned(engine)
    directory = tmp_path / "reward_models" / "v000"
    export.export_reward_model(engine, tiny_tokenizer(), directory, card={})
    merged = AutoModelForSequenceClassification.from_pretrained(directory)
    blank = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with_adapter = PeftModel.from_pretrained(blank, str(directory / "adapter"))
    with torch.no_grad():
        [expected] = model(IDS, torch.arange(10)[None], torch.tensor([9]))
        assert float(merged(IDS).logits) == pytest.approx(float(expected), abs=1e-4)
        assert float(with_adapter(IDS).logits) == pytest.approx(float(expected), abs=1e-4)


def test_layers_that_are_stored_transposed_are_merged_as_well() -> None:
    network = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    policy = PolicyModel(network.eval())
    lora = LoraConfig(rank=2, target_modules=("c_attn", "c_fc"))
    adapters.choose(policy, TrainedPartConfig(lora=lora), seed=0, where="models.policy.train")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    shapes = adapters.merged(engine_over(policy)).parameter_shapes()
    weights = adapters.merged(engine_over(policy)).gather(list(shapes))
    plain = GPT2LMHeadModel(network.config).eval()
    plain.load_state_dict({n.removeprefix("network."): t for n, t in weights.items()}, strict=False)
    policy.eval()
    assert (logprobs_of(plain) - logprobs(policy)).abs().max() < 1e-4


def test_bfloat16_is_merged_in_float32_and_rounded_once(base: Path) -> None:
    policy = adapters.open_policy(base, LORA, precision="bf16", seed=1)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    layer: Any = policy.network.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    name = "network.model.layers.0.mlp.up_proj.weight"
    found = adapters.merged(engine_over(policy)).gather([name])[name]
    a, b = (getattr(layer, f"lora_{part}")["default"].weight.detach().double() for part in "AB")
    exact = layer.base_layer.weight.double() + 3.0 * (b @ a)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_gradient_checkpointing_over_a_frozen_base_changes_nothing(base: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = adapters.open_policy(base, LORA, precision="fp32", seed=1)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.01)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        engine = engine_over(policy)
        positions = torch.arange(10)
        engine.backward(engine.forward(IDS, positions[None], positions[:-1], IDS[0, 1:])[0].sum(), last=True)
        gradients.append(engine.full_gradient())
    plain, recomputed = gradients
    assert list(plain) == list(recomputed)
    assert all(plain[name].any() for name in plain)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainedPartConfig(lora=LoraConfig(target_modules=("q_proj", "qkv"))), "qkv matches no linear layer"),
        (TrainedPartConfig(lora=LoraConfig(target_modules=("lm_head",))), "lm_head matches no linear layer"),
        (TrainedPartConfig(lora=LoraConfig(target_modules=("embed_tokens",))), "embed_tokens matches no linear"),
        (TrainedPartConfig(last_blocks=3), "LlamaForCausalLM has 2 transformer blocks"),
    ],
)
def test_what_is_not_there_cannot_be_trained(train: TrainedPartConfig, message: str) -> None:
    policy: TrainedModel = tiny_policy()
    with pytest.raises(UserError, match=message) as caught:
        adapters.choose(policy, train, seed=0, where="models.policy.train")
    assert "models.policy.train" in str(caught.value)

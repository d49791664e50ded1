"""The networks give what a plain forward of one sequence gives, whatever the layout, and load or say why not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.models import ScratchModelConfig
from learner.batch import Layout, TokenSequence, collate
from learner.models import load_critic, load_policy, load_scalar, new_policy, scalar_from_policy
from protocol.errors import UserError
from protocol.logprobs import token_logprobs
from tests.learner_batches import VOCABULARY, tiny_critic, tiny_policy
from tests.tiny import tiny_llama, tiny_tokenizer


def draw(num: int = 7) -> list[TokenSequence]:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 20, size=(num, 2))
    return [TokenSequence(*(rng.integers(0, VOCABULARY, size=n).astype(np.int32) for n in pair)) for pair in sizes]


def one_by_one(network: torch.nn.Module, sequences: list[TokenSequence], *, temperature: float) -> list[Tensor]:
    """Compute response log-probs with the Hugging Face network itself, without any layout."""
    found = []
    for prompt, response in sequences:
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        logits = network(input_ids=ids[None]).logits[0].double() / temperature
        every = torch.log_softmax(logits, dim=-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        found.append(every[len(prompt) - 1 :])
    return found


def gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("layout", ["packed", "sorted"])
def test_layout_changes_neither_logprobs_nor_gradients(layout: Layout) -> None:
    policy, sequences = tiny_policy(), draw()
    weights = torch.randn(sum(len(s.response_ids) for s in sequences), generator=torch.Generator().manual_seed(0))
    expected = torch.cat(one_by_one(policy.network, sequences, temperature=0.7))
    (expected * weights).sum().backward()
    expected_gradient = gradient(policy)
    policy.zero_grad()
    m = collate(sequences, pad_id=5, layout=layout)
    logprobs, entropies = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids, temperature=0.7)
    (logprobs * weights).sum().backward()
    assert entropies is None
    assert (logprobs - expected).abs().max() < 1e-5
    assert (gradient(policy) - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("layout", ["packed", "sorted"])
def test_no_sequence_sees_another(layout: Layout) -> None:
    policy, sequences = tiny_policy(), draw()
    changed = [*sequences]
    changed[2] = TokenSequence(changed[2].prompt_ids, (changed[2].response_ids + 1) % VOCABULARY)
    results = []
    for batch in (sequences, changed):
        m = collate(batch, pad_id=0, layout=layout)
        logprobs, _ = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
        results.append(logprobs[m.sequence != 2])
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", ["packed", "sorted"])
def test_values_are_those_of_every_position(layout: Layout) -> None:
    critic, sequences = tiny_critic(), draw()
    m = collate(sequences, pad_id=0, layout=layout)
    values = critic(m.input_ids, m.position_ids, m.value_index)
    expected, ends = [], []
    for prompt, response in sequences:
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        states = critic.network.model(input_ids=ids[None]).last_hidden_state[0]
        every = critic.network.score(states)[:, 0]
        expected.append(every[len(prompt) - 1 : -1])
        ends.append(every[-1:])
    assert (values - torch.cat(expected + ends)).abs().max() < 1e-5


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    m = collate(draw(), pad_id=0, layout="sorted")
    results = []
    for rows in (1000, 16):
        monkeypatch.setattr("protocol.logprobs._CHUNK_ROWS", rows)
        policy.zero_grad()
        logprobs, _ = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), gradient(policy)))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-6
    assert (results[0][1] - results[1][1]).norm() < 1e-5 * results[0][1].norm()


def test_entropy_and_its_logprobs_match_a_slow_loop() -> None:
    policy = tiny_policy()
    m = collate(draw(), pad_id=0, layout="sorted")
    inputs = (m.input_ids, m.position_ids, m.predict_index, m.target_ids)
    logprobs, entropies = policy(*inputs, temperature=0.7, with_entropy=True)
    assert torch.equal(logprobs, policy(*inputs, temperature=0.7)[0].detach())
    logits = policy.head(policy.hidden(m.input_ids, m.position_ids, m.predict_index)).detach().double() / 0.7
    for row, logit in enumerate(logits):
        p = [float(x) for x in torch.softmax(logit, dim=0)]
        assert entropies[row].item() == pytest.approx(-sum(x * np.log(x) for x in p), abs=1e-5)


def test_logprobs_are_fp32_whatever_the_logits() -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert token_logprobs(logits, torch.arange(4)).dtype == torch.float32


def test_a_stand_in_has_a_gradient_of_zeros() -> None:
    policy, critic = tiny_policy(), tiny_critic()
    m = collate([], pad_id=0, layout="sorted")
    policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)[0].sum().backward()
    critic(m.input_ids, m.position_ids, m.predict_index).sum().backward()
    for module in (policy, critic):
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_new_policy_is_the_same_for_the_same_seed() -> None:
    scratch = ScratchModelConfig(hidden_size=64, mlp_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
    tokenizer = tiny_tokenizer()
    first, again, other = (new_policy(scratch, tokenizer, seed=s) for s in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.network.config.eos_token_id == tokenizer.eos_token_id


def test_new_policy_refuses_a_tokenizer_that_is_too_large() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        new_policy(ScratchModelConfig(vocab_size=16), tiny_tokenizer(), seed=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy") / "tiny")


def test_a_scalar_model_keeps_the_trunk_and_draws_its_head_by_seed(directory: Path) -> None:
    policy = load_policy(directory, precision="fp32")
    first, again = (scalar_from_policy(directory, seed=4) for _ in range(2))
    trunk = dict(policy.network.model.named_parameters())
    for name, parameter in first.network.model.named_parameters():
        assert torch.equal(parameter, trunk[name]), name
    assert torch.equal(first.network.score.weight, again.network.score.weight)
    assert first.network.score.weight.detach().std() == pytest.approx(1 / 65**0.5, rel=0.3)


def test_bf16_loads_in_bf16_and_dropout_is_off(tmp_path: Path, directory: Path) -> None:
    copy = tmp_path / "dropping"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    policy = load_policy(copy, precision="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert policy.network.config.attention_dropout == 0.0


def test_a_critic_from_a_reward_model_speaks_in_calibrated_scores(tmp_path: Path) -> None:
    model = tiny_critic()
    model.network.save_pretrained(tmp_path)
    raw = load_scalar(tmp_path, precision="fp32")
    config = json.loads((tmp_path / "config.json").read_text())
    config["rondo_calibration"] = {"gain": 2.0, "bias": -0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    critic = load_critic(tmp_path, precision="fp32")
    m = collate(draw(), pad_id=0, layout="sorted")
    inputs = (m.input_ids, m.position_ids, m.last_index)
    assert torch.allclose(critic(*inputs), 2.0 * raw(*inputs) - 0.5, atol=1e-5)


def test_what_cannot_be_loaded_says_why(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        load_policy(tmp_path / "missing", precision="fp32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_policy(tmp_path / "empty", precision="fp32")
    (tmp_path / "empty" / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(UserError, match="no weights"):
        load_policy(tmp_path / "empty", precision="fp32")
    with pytest.raises(UserError, match="no score head"):
        load_scalar(directory, precision="fp32")

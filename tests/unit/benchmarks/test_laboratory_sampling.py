"""The laboratory's sampler: the log-probs are the learner's, ends are where EOS is, and a seed decides."""

import numpy as np
import pytest
import torch

from benchmarks.experiments.laboratory import networks
from benchmarks.experiments.laboratory.language import EOS, MAX_TOKENS, VOCABULARY, draw_prompts
from benchmarks.experiments.laboratory.sampling import Samples, distance, logprobs_of, released_kl, sample
from learner.models import PolicyModel

PROMPTS = draw_prompts(40, np.random.default_rng(0))


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return networks.new_policy(32, seed=1)


@pytest.fixture(scope="module")
def drawn(policy: PolicyModel) -> Samples:
    return sample(policy, PROMPTS, seed=7)


def test_logprobs_are_those_of_the_learner(policy: PolicyModel, drawn: Samples) -> None:
    for sampled, learned in zip(drawn.logprobs, logprobs_of(policy, drawn), strict=True):
        np.testing.assert_allclose(sampled, learned, atol=1e-5)


def test_logprobs_are_those_of_the_whole_network(policy: PolicyModel, drawn: Samples) -> None:
    for prompt, response, found in zip(drawn.prompts[:5], drawn.responses[:5], drawn.logprobs[:5], strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            logits = policy.network(input_ids=ids).logits[0]
        expected = [
            float(torch.log_softmax(logits[len(prompt) - 1 + t], -1)[int(token)]) for t, token in enumerate(response)
        ]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_response_ends_with_its_first_eos_or_at_the_limit(drawn: Samples) -> None:
    lengths = {len(response) for response in drawn.responses}
    assert len(lengths) > 3
    for response, cut in zip(drawn.responses, drawn.truncated, strict=True):
        assert EOS not in response[:-1]
        assert cut == (int(response[-1]) != EOS)
        assert not cut or len(response) == MAX_TOKENS
    assert any(drawn.truncated)
    assert not all(drawn.truncated)


def test_the_seed_decides(policy: PolicyModel, drawn: Samples) -> None:
    again, other = sample(policy, PROMPTS, seed=7), sample(policy, PROMPTS, seed=8)
    assert [r.tolist() for r in again.responses] == [r.tolist() for r in drawn.responses]
    assert [r.tolist() for r in other.responses] != [r.tolist() for r in drawn.responses]


def test_samples_have_the_frequencies_of_the_policy(policy: PolicyModel) -> None:
    many = sample(policy, [PROMPTS[0]] * 2000, seed=0)
    with torch.no_grad():
        logits = policy.network(input_ids=torch.from_numpy(PROMPTS[0].astype(np.int64))[None]).logits[0, -1]
    found = np.bincount([int(r[0]) for r in many.responses], minlength=VOCABULARY) / 2000
    np.testing.assert_allclose(found, logits.softmax(-1).numpy(), atol=0.04)


def test_distance_by_a_slow_loop(policy: PolicyModel, drawn: Samples) -> None:
    reference = networks.new_policy(32, seed=2)
    exact = k1 = released = entropy = 0.0
    for prompt, response in zip(drawn.prompts, drawn.responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            own, ref = (m.network(input_ids=ids).logits[0].double().log_softmax(-1) for m in (policy, reference))
        for t, token in enumerate(response):
            p, q = own[len(prompt) - 1 + t], ref[len(prompt) - 1 + t]
            exact += float((p.exp() * (p - q)).sum())
            entropy -= float((p.exp() * p).sum())
            log_ratio = float(p[int(token)] - q[int(token)])
            k1 += log_ratio
            released += np.exp(log_ratio) - 1 - log_ratio
    num, tokens = len(drawn.responses), sum(len(r) for r in drawn.responses)
    found = distance(policy, reference, drawn)
    assert found.exact_nats == pytest.approx(exact / num, rel=1e-4)
    assert found.k1_nats == pytest.approx(k1 / num, rel=1e-4, abs=1e-4)
    assert found.k1_nats_per_token == pytest.approx(k1 / tokens, rel=1e-4, abs=1e-5)
    columns = 5 + max(len(r) for r in drawn.responses) - 1
    assert found.released == pytest.approx(released / (num * columns), rel=1e-4)
    assert found.entropy_nats_per_token == pytest.approx(entropy / tokens, rel=1e-4)


def test_the_released_code_divides_by_prompt_and_padding() -> None:
    # Two tokens with ratios 2 and 1/2 in a batch of two rows and four columns.
    logprobs, reference = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    expected = ((2 - 1 - np.log(2)) + (0.5 - 1 + np.log(2))) / 8
    assert released_kl(logprobs, reference, num_rows=2, num_columns=4) == pytest.approx(expected)

import math
import pickle

import numpy as np
import pytest

from actors.environment import environment
from actors.errors import EngineFailedError, InvalidRolloutError, StaleWeightsError, WeightMismatchError
from actors.sampling import EngineOutput, SamplingPlan, check_requests, context_tokens, plan_sampling, to_rollout
from configs.rollout import RolloutConfig
from protocol.messages import PolicyVersions, Prompt, RolloutKey, RolloutMeta, RolloutRequest

EOS = 1
CONFIG = RolloutConfig(max_prompt_tokens=8, max_response_tokens=4)


def make_request(*, sample: int = 0, prompt_tokens: int = 3, max_response_tokens: int = 4) -> RolloutRequest:
    return RolloutRequest(
        key=RolloutKey(round=1, iteration=2, prompt_id="p7", sample=sample),
        prompt=Prompt(prompt_id="p7", token_ids=np.arange(10, 10 + prompt_tokens, dtype=np.int32), text="hello"),
        seed=123 + sample,
        max_response_tokens=max_response_tokens,
        temperature=0.7,
    )


def convert(tokens: list[int], logprobs: list[float], reason: str | None):
    output = EngineOutput(token_ids=tokens, logprobs=logprobs, finish_reason=reason)
    return to_rollout(make_request(), output, eos_token_id=EOS, policy_version=5, worker="rollout-0")


def test_sampling_follows_the_configuration_and_the_request():
    config = RolloutConfig(top_p=0.9, top_k=40, truncated_sampling="allow")
    assert plan_sampling(config, make_request(), eos_token_id=EOS) == SamplingPlan(
        temperature=0.7, top_p=0.9, top_k=40, seed=123, max_tokens=4, stop_token_ids=(EOS,)
    )


def test_greedy_decoding_ignores_temperature_and_truncation():
    config = RolloutConfig(decoding="greedy", temperature=0.7, top_p=0.9, top_k=40, truncated_sampling="allow")
    plan = plan_sampling(config, make_request(), eos_token_id=EOS)
    assert plan.greedy
    assert (plan.temperature, plan.top_p, plan.top_k) == (0.0, 1.0, 0)


def test_samples_of_one_prompt_have_seeds_of_their_own():
    plans = [plan_sampling(CONFIG, make_request(sample=i), eos_token_id=EOS) for i in range(3)]
    assert [plan.seed for plan in plans] == [123, 124, 125]


def test_the_context_holds_a_prompt_and_a_response():
    assert context_tokens(CONFIG) == 12
    check_requests(CONFIG, [make_request(prompt_tokens=8), make_request(sample=1)])


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([make_request(prompt_tokens=9)], "needs 9 prompt and up to 4 response tokens, but the context holds 12"),
        ([make_request(prompt_tokens=0)], "empty prompt"),
        ([make_request(max_response_tokens=0)], "no room"),
        ([make_request(), make_request()], "asked for twice"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_key(requests: list[RolloutRequest], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        check_requests(CONFIG, requests)
    assert "r1/i2/p7#0" in str(caught.value)


def test_a_finished_response_keeps_its_eos():
    rollout = convert([20, 21, EOS], [-0.5, -1.25, -2.0], "stop")
    assert rollout.response_ids.tolist() == [20, 21, EOS]
    assert rollout.response_ids.dtype == np.int32
    assert rollout.behavior_logprobs.tolist() == [-0.5, -1.25, -2.0]
    assert rollout.behavior_logprobs.dtype == np.float32
    assert rollout.policy_versions == PolicyVersions(first=5, last=5)
    assert (rollout.finish_reason, rollout.worker, rollout.num_tokens) == ("stop", "rollout-0", 6)


def test_a_truncated_response_has_no_eos():
    rollout = convert([20, 21, 22, 23], [-1.0] * 4, "length")
    assert rollout.finish_reason == "length"
    meta = RolloutMeta.of(rollout)
    assert (meta.prompt_tokens, meta.response_tokens, meta.finish_reason) == (3, 4, "length")


@pytest.mark.parametrize(
    ("tokens", "logprobs", "reason", "message"),
    [
        ([20, EOS], [-1.0], "stop", "2 tokens but 1 log-probs"),
        ([20, EOS], [-1.0, math.nan], "stop", "log-prob nan at token 1"),
        ([20, EOS], [-math.inf, -1.0], "stop", "log-prob -inf at token 0"),
        ([20, 21], [-1.0, -1.0], "abort", "'abort'"),
        ([20, 21], [-1.0, -1.0], None, "None"),
        ([], [], "stop", "0 tokens"),
        ([20] * 5, [-1.0] * 5, "length", "5 tokens"),
        ([20, 21], [-1.0, -1.0], "stop", "EOS is 1"),
        ([20, 21, 22, EOS], [-1.0] * 4, "length", "EOS is 1"),
    ],
)
def test_an_output_that_cannot_be_trained_on_names_its_key(
    tokens: list[int], logprobs: list[float], reason: str | None, message: str
):
    with pytest.raises(InvalidRolloutError, match=message) as caught:
        convert(tokens, logprobs, reason)
    assert "r1/i2/p7#0" in str(caught.value)


@pytest.mark.parametrize("error", [StaleWeightsError, WeightMismatchError, InvalidRolloutError, EngineFailedError])
def test_errors_survive_the_way_to_the_driver(error: type[Exception]):
    copy = pickle.loads(pickle.dumps(error("rollout-0 can prove none")))
    assert type(copy) is error
    assert str(copy) == "rollout-0 can prove none"


def test_the_process_environment_bounds_threads_and_stays_on_the_loopback_device():
    variables = environment(RolloutConfig(threads_per_worker=3), "cpu")
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["VLLM_HOST_IP"] == "127.0.0.1"
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"
    assert "TORCHDYNAMO_DISABLE" not in environment(RolloutConfig(), "cuda")

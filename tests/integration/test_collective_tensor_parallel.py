"""Every rank of a tensor-parallel engine joins a broadcast. Two ranks on a CPU, which a run's configuration refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from actors.environment import environment
from configs.rollout import RolloutConfig

config = RolloutConfig(
    tensor_parallel=2, max_prompt_tokens=32, max_response_tokens=24, max_concurrent_sequences=16, kv_cache_gib=0.03
)
os.environ.update(environment(config, "cpu"))

import torch
from transformers import LlamaForCausalLM
from actors.engine import VLLMEngine
from learner.distributed import listen
from protocol.broadcast import LOOPBACK, Meeting
from tests.tiny import tiny_llama, tiny_publication

root = Path(sys.argv[1])
network = LlamaForCausalLM.from_pretrained(tiny_llama(root / "policy", hidden=128), dtype=torch.float32).eval()
manifest, buckets = tiny_publication(network, policy_version=1)
engine = VLLMEngine(str(tiny_llama(root / "stale", hidden=128, seed=1)), config, backend="cpu")
meeting = Meeting(listen(LOOPBACK), timeout_s=60)


def send():
    group = meeting.assemble(receivers=4, device=torch.device("cpu"), timeout_s=60)
    for bucket in buckets:
        group.broadcast(torch.from_numpy(bucket.copy()))
    group.finish()
    return group.size


meeting.excuse([0, 1])  # those of another engine
with ThreadPoolExecutor() as threads:
    sending = threads.submit(send)
    engine.receive(manifest, meeting.rendezvous, first_receiver=2, address=LOOPBACK, timeout_s=60)
    assert sending.result() == 3
assert engine.checksum() == manifest.loaded_checksum
held = engine.canary_logprobs(manifest.canary.token_ids)
assert max(abs(a - b) for a, b in zip(held, manifest.canary.logprobs, strict=True)) < 1e-4
"""


@pytest.mark.slow
def test_both_ranks_of_an_engine_receive_their_part(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

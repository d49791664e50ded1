"""What goes out is what was trained: equal greedy tokens in transformers and vLLM, whatever the number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.worker import environment
from configs.rollout import RolloutConfig
from tests.rondo_process import ROOT, rondo
from tests.tiny_run import tiny_overrides

pytestmark = pytest.mark.slow
GREEDY = """
import json, sys
import numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from actors.engine import VLLMEngine
from configs.rollout import RolloutConfig
from protocol.messages import Prompt, RolloutKey, RolloutRequest

directory = Path(sys.argv[1])
config = RolloutConfig.model_validate_json(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(directory)
asked = ["how do i clean a copper pot ?", "please help me rob a new bank .", "i want to mark a leather toy ."]
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    for text in asked
]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
theirs = []
for ids in prompts:
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=config.max_response_tokens, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    theirs.append(out[0, len(ids):].tolist())
requests = [
    RolloutRequest(
        key=RolloutKey(1, 0, str(n), 0), seed=n, temperature=1.0,
        max_response_tokens=config.max_response_tokens,
        prompt=Prompt(prompt_id=str(n), token_ids=np.array(ids, dtype=np.int32), text=asked[n]),
    )
    for n, ids in enumerate(prompts)
]
engine = VLLMEngine(str(directory), config, backend="cpu")
ours = {
    rollout.key.prompt_id: rollout.response_ids.tolist()
    for step in engine.generate(requests, policy_version=0, worker="w")
    for rollout in step
}
print("RESULT", json.dumps({"transformers": theirs, "vllm": [ours[str(n)] for n in range(len(asked))]}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run's run directory."""
    directory = tmp_path_factory.mktemp("runs")
    done = rondo("train", "quickstart", *tiny_overrides(directory, "rounds.iterations=2", "learner.sft.num_steps=120"))
    assert done.returncode == 0, done.stderr
    return directory / "tiny"


def test_greedy_tokens_are_equal_in_transformers_and_vllm(exported: Path) -> None:
    config = RolloutConfig(
        max_prompt_tokens=60, max_response_tokens=24, decoding="greedy", truncated_sampling="allow",
        max_concurrent_sequences=8,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(exported / "policies" / "v002"), config.model_dump_json()],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, **environment(config, "cpu")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["transformers"] == result["vllm"]
    assert all(result["vllm"])


def test_the_number_of_rollout_workers_changes_no_token(exported: Path, tmp_path: Path) -> None:
    """One worker trained the fixture; two and three sample the same tokens by key in the first iteration."""
    from pyarrow import parquet

    def first_iteration(run: Path) -> dict[tuple[str, int], list[int]]:
        rows = parquet.read_table(run / "rollouts" / "v00000.parquet").to_pylist()
        return {(row["prompt_id"], row["sample"]): row["response_ids"] for row in rows}

    one = first_iteration(exported)
    for workers in (2, 3):
        runs = tmp_path / str(workers)
        done = rondo(
            "train", "quickstart",
            *tiny_overrides(runs, "rounds.iterations=2", "learner.sft.num_steps=120", f"rollout.workers={workers}",
                            "rollout.cpus_per_worker=0.25"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert first_iteration(runs / "tiny") == one

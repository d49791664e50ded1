"""SFT and reward modelling: learning what is there to learn, on real ranks too."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.data import SourceConfig
from configs.learner import LearnerConfig, OptimizerConfig
from configs.run import RunConfig
from learner import worker
from learner.batch import TokenSequence
from learner.comparison_task import ComparisonTask
from learner.comparisons import BASE, ComparisonSource, RewardModelJob, read_comparisons, split
from learner.models import load_policy, scalar_from_policy
from learner.reward_modelling import train_reward_model
from learner.supervised import DemonstrationTask, train_sft
from learner.supervised_loop import StageContext, encode_pair
from protocol.tokens import load_tokenizer
from tests.plain_engine import PlainEngine
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import tiny_config

HERE = "tests.integration.test_supervised"
WORDS = ("river", "stone", "lamp", "cloud", "door", "paper", "green", "seven")


def kindness(*, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Answers with more of the word `please` are preferred: easy to learn."""
    rng = random.Random(seed)
    for number in range(count):
        few, many = sorted(rng.sample(range(5), 2))
        answers = [" ".join(rng.sample(["please"] * kind + list(WORDS[:4]), 4 + kind)) for kind in (few, many)]
        yield {"prompt": f"say {rng.choice(WORDS)} {number}", "chosen": answers[1], "rejected": answers[0]}


def rankings(*, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Rankings of four answers, two of which are tied, and a prompt that comes again as a pair."""
    for number in range(count):
        answers = [f"{word} {number}" for word in WORDS[:4]]
        yield {"prompt": f"rank {number}", "completions": answers, "ranks": [1, 2, 2, 3]}


def context() -> StageContext:
    settings = LearnerConfig(micro_batch_tokens=512)
    return StageContext(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        make_engine=functools.partial(PlainEngine, settings=settings),
    )


def small_config(directory: Path, *overrides: str) -> RunConfig:
    return tiny_config(directory, "learner.micro_batch_tokens=512", *overrides)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def on_ranks(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Run both stages on real ranks under DeepSpeed, and return what rank 0 reports."""
    number = config.learner.workers
    remote = worker.remote_class().options(num_cpus=0.5, runtime_env={"env_vars": worker.environment(config)})
    ranks = [
        remote.remote(rank=rank, world_size=number, config=config, run_directory=directory) for rank in range(number)
    ]
    address, port = ray.get(ranks[0].address.remote(), timeout=120)
    ray.get([rank.connect.remote(address, port) for rank in ranks], timeout=120)
    policy, reward = directory / "policies" / "v000", directory / "reward_models" / "v000"
    sft = ray.get([rank.train_sft.remote(policy) for rank in ranks], timeout=200)[0]
    trained = [rank.train_reward_model.remote(job(config, policy=policy, output=reward)) for rank in ranks]
    found = {"sft": sft, "reward_model": ray.get(trained, timeout=200)[0]}
    for rank in ranks:
        ray.kill(rank)
    return found


def base(config: RunConfig) -> tuple[ComparisonSource, ...]:
    assert config.data.preferences is not None
    return (ComparisonSource(name=BASE, data=config.data.preferences),)


def job(config: RunConfig, *, policy: Path, output: Path, **others: Any) -> RewardModelJob:
    return RewardModelJob(policy=policy, output=output, sources=base(config), **others)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_stages_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("one", "again", "two")]
    configs = [
        small_config(directory, "learner.sft.num_steps=12", f"learner.workers={ranks}", f"learner.zero_stage={stage}")
        for directory, ranks, stage in zip(directories, (1, 1, 2), (0, 0, 2), strict=True)
    ]
    one, again, two = (on_ranks(config, directory) for config, directory in zip(configs, directories, strict=True))
    for part in ("policies/v000", "reward_models/v000"):
        assert weights(directories[0] / part) == weights(directories[1] / part)
    assert one == again
    assert two["sft"]["heldout_loss"] == pytest.approx(one["sft"]["heldout_loss"], rel=1e-4)
    assert two["reward_model"]["heldout"]["nll_nats"] == pytest.approx(
        one["reward_model"]["heldout"]["nll_nats"], rel=1e-3
    )
    assert one["sft"]["num_demonstrations"] + one["sft"]["num_heldout"] == 300


def test_sft_lowers_the_loss_and_writes_a_policy(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    output = tmp_path / "policies" / "v000"
    found = train_sft(small_config(tmp_path), context(), output=output, report=lambda f: reports.append(dict(f)))
    assert [report["step"] for report in reports] == [10, 20, 30]
    assert reports[0]["loss"] > reports[1]["loss"] > reports[2]["loss"] == found["train_loss"]
    assert found["heldout_loss"] < 0.8 * np.log(320)
    assert found["heldout_perplexity"] == pytest.approx(np.exp(found["heldout_loss"]))
    assert reports[-1]["tokens_per_s"] > 0
    assert reports[0]["lr"] == pytest.approx(3e-3 * 10 / 20)  # half-way through the warm-up
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    tokenizer: Any = load_tokenizer(output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how do i clean a copper pot ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert "| algorithm | supervised fine-tuning |" in (output / "README.md").read_text()


def test_the_loss_is_that_of_the_response_tokens_alone(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "policy")
    policy = load_policy(directory, precision="fp32")
    rng = np.random.default_rng(0)
    rows = [
        TokenSequence(rng.integers(4, 512, p).astype(np.int32), rng.integers(4, 512, t).astype(np.int32))
        for p, t in ((5, 9), (12, 3), (2, 17))
    ]
    task = DemonstrationTask(rows, pad_id=0, layout="sorted", device=torch.device("cpu"))
    indices = [0, 1, 2]
    assert task.normalizer(indices) == 29
    loss, _ = task.loss(policy, indices, normalizer=29)
    loss.backward()
    found = policy.network.model.embed_tokens.weight.grad.clone()

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    total = torch.zeros(())
    for prompt, response in rows:
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100  # transformers' own way of leaving the prompt out
        total = total + model(ids, labels=labels).loss * len(response) / 29
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)
    halves = sum(task.loss(policy, part, normalizer=29)[0] for part in ([0], [2, 1]))
    torch.testing.assert_close(loss.detach(), halves.detach(), rtol=1e-5, atol=1e-6)


def test_without_demonstrations_the_policy_stays_as_it_is(tmp_path: Path) -> None:
    given = tiny_llama(tmp_path / "given", tied=True)
    config = small_config(
        tmp_path, f"models.policy.path={given}", "models.policy.scratch=null", "data.demonstrations=null"
    )
    found = train_sft(config, context(), output=tmp_path / "v000", report=lambda figures: None)
    assert found["num_steps"] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (given, tmp_path / "v000"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path / "v000").get_vocab() == tiny_tokenizer().get_vocab()


def test_a_demonstration_that_does_not_fit_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": word * (1 if word != "lamp" else 400)} for word in WORDS]
    data = tmp_path / "demonstrations.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    given = tiny_llama(tmp_path / "given")
    config = small_config(
        tmp_path,
        f"models.policy.path={given}",
        "models.policy.scratch=null",
        f"data.demonstrations.source={data}",
        "data.demonstrations.count=null",
        "learner.sft.num_steps=2",
    )
    found = train_sft(config, context(), output=tmp_path / "v000", report=lambda figures: None)
    assert (found["num_dropped"], found["num_demonstrations"] + found["num_heldout"]) == (1, 7)
    assert "longer than the model's context" in (tmp_path / "v000" / "README.md").read_text()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "policy", hidden=32)


def test_a_reward_model_learns_what_is_preferred(policy: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        f"data.preferences.source={HERE}:kindness",
        "data.preferences.count=240",
        "learner.reward_model.num_epochs=6",
        "learner.reward_model.heldout_fraction=0.2",
        "learner.reward_model.optimizer.learning_rate=3e-3",
    )
    output = tmp_path / "reward_models" / "v000"
    wanted = job(config, policy=policy, output=output)
    found = train_reward_model(config, context(), job=wanted, report=lambda figures: None)
    heldout = found["heldout"]
    assert found["num_train_prompts"] + heldout["num_prompts"] == 240
    assert 24 <= heldout["num_prompts"] == heldout["num_pairs"] <= 72  # about a fifth, drawn prompt by prompt
    assert heldout["accuracy"] > 0.8
    assert heldout["nll_nats"] < np.log(2)
    assert heldout["length_correlation"] > 0.5  # the preferred answers are the longer ones here
    assert json.loads((output / "reward_model_report.json").read_text()) == found

    model: Any = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = load_tokenizer(output)
    pairs = list(kindness(seed=99, count=40))
    with torch.no_grad():
        scores = {
            side: np.array([score(model, encode_pair(tokenizer, pair["prompt"], pair[side])) for pair in pairs])
            for side in ("chosen", "rejected")
        }
    assert np.mean(scores["chosen"] > scores["rejected"]) > 0.75


def kind_rankings(*, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Rankings of four answers by how often they say `please`; two of them are tied."""
    rng = random.Random(seed)
    for number in range(count):
        counts = rng.sample([0, 1, 2, 2, 4], 4)
        answers = [" ".join(["please"] * kind + rng.sample(WORDS, 3)) for kind in counts]
        ranks = [1 + sum(other > kind for other in counts) for kind in counts]
        yield {"prompt": f"say {rng.choice(WORDS)} {number}", "completions": answers, "ranks": ranks}


@pytest.mark.parametrize("loss", ["pairwise", "plackett_luce"])
def test_every_loss_learns_from_rankings_by_one_setting(policy: Path, tmp_path: Path, loss: str) -> None:
    config = small_config(
        tmp_path,
        f"data.preferences={{source: '{HERE}:kind_rankings', count: 60}}",
        f"learner.reward_model.loss={loss}",
        "learner.reward_model.margin=none",
        "learner.reward_model.num_epochs=5",
        "learner.reward_model.heldout_fraction=0.25",
        "learner.reward_model.optimizer.learning_rate=3e-3",
    )
    output = tmp_path / "v000"
    wanted = job(config, policy=policy, output=output)
    found = train_reward_model(config, context(), job=wanted, report=lambda figures: None)
    assert found["heldout"]["accuracy"] > 0.75
    assert found["heldout"]["nll_nats"] < np.log(2)
    named = {"pairwise": "Bradley-Terry, mean over pairs", "plackett_luce": "Plackett-Luce on rankings"}[loss]
    assert f"| algorithm | {named} |" in (output / "README.md").read_text()


def score(model: Any, sequence: TokenSequence) -> float:
    return model(torch.from_numpy(np.concatenate(sequence)).long()[None]).logits.item()


def test_a_ranking_is_one_element_and_counts_as_one_prompt(policy: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"data.preferences.source={HERE}:rankings", "data.preferences.count=3")
    tokenizer = load_tokenizer(policy)
    elements, reading = read_comparisons(config, tokenizer, base(config), context_tokens=None)
    assert reading.num_kept == 3
    assert [len(element.sequences) for element in elements] == [4, 4, 4]
    assert [len(element.better) for element in elements] == [5, 5, 5]  # of six pairs, one is a tie
    prompts = [element.sequences[0].prompt_ids.tobytes() for element in elements]
    assert len(set(prompts)) == 3

    single = ComparisonTask(elements[:1], centering=0.0, pad_id=0, layout="sorted", device=torch.device("cpu"))
    model = scalar_from_policy(policy, seed=1).eval()
    scores = [score(model.network, sequence) for sequence in elements[0].sequences]
    order = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    expected = np.mean([np.logaddexp(0, scores[worse] - scores[better]) for better, worse in order])
    loss, diagnostics = single.loss(model, [0], normalizer=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert diagnostics["accuracy"].item() == pytest.approx(np.mean([scores[b] > scores[w] for b, w in order]))

    mixed = ComparisonTask(elements, centering=0.01, pad_id=0, layout="sorted", device=torch.device("cpu"))
    whole, _ = mixed.loss(model, [0, 1, 2], normalizer=3.0)
    parts = sum(mixed.loss(model, part, normalizer=3.0)[0] for part in ([2], [0, 1]))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_learning_rates_and_steps_follow_the_settings(policy: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        f"data.preferences.source={HERE}:rankings",
        "data.preferences.count=12",
        "learner.reward_model.num_epochs=2",
        "learner.reward_model.batch_pairs=10",
        "learner.reward_model.optimizer.schedule=constant",
    )
    made: list[PlainEngine] = []

    def make(module: Any, *, optimizer: OptimizerConfig, name: str, total_steps: int) -> PlainEngine:
        made.append(
            PlainEngine(module, optimizer=optimizer, settings=config.learner, name=name, total_steps=total_steps)
        )
        return made[-1]

    place = StageContext(rank=0, world_size=1, device=torch.device("cpu"), make_engine=make)
    wanted = job(config, policy=policy, output=tmp_path / "v000")
    found = train_reward_model(config, place, job=wanted, report=lambda figures: None)
    # Two prompts of five pairs fill a step.
    assert found["num_train_pairs"] == 5 * found["num_train_prompts"]
    assert found["num_steps"] == made[0].num_steps == 2 * -(-found["num_train_prompts"] // 2)


def test_halves_share_no_prompt_and_a_held_out_prompt_stays_held_out(policy: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"data.preferences.source={HERE}:kindness", "data.preferences.count=200")
    tokenizer = load_tokenizer(policy)
    elements, _ = read_comparisons(config, tokenizer, base(config), context_tokens=None)
    sides = {
        half: split(
            elements, job(config, policy=policy, output=tmp_path, half=half, heldout_share=0.4), fraction=0.1, seed=3
        )
        for half in ("all", "train", "heldout")
    }
    assert sides["all"][1] == sides["train"][1] == sides["heldout"][1]
    assert sorted(sides["train"][0] + sides["heldout"][0]) == sides["all"][0]
    assert not {*sides["train"][0]} & {*sides["heldout"][0]}
    assert 40 < len(sides["heldout"][0]) < 104  # 0.4 of about 180
    fewer = elements[:60]
    again = split(fewer, job(config, policy=policy, output=tmp_path), fraction=0.1, seed=3)
    assert again[1] == [index for index in sides["all"][1] if index < 60]


def test_a_source_counts_by_its_weight(policy: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"data.preferences.source={HERE}:kindness", "data.preferences.count=4")
    tokenizer = load_tokenizer(policy)
    [source] = base(config)
    ranked = SourceConfig(source=f"{HERE}:rankings", count=4)
    heavy = ComparisonSource(name="round 1", data=ranked, weight=3.0)
    none = ComparisonSource(name="round 2", data=source.data, weight=0.0)
    elements, _ = read_comparisons(config, tokenizer, (source, heavy, none), context_tokens=None)
    assert [set(element.sources) for element in elements] == [{"base"}] * 4 + [{"round 1"}] * 4
    task = ComparisonTask(elements, centering=0.0, pad_id=0, layout="sorted", device=torch.device("cpu"))
    model = scalar_from_policy(policy, seed=1).eval()
    single = [task.loss(model, [index], normalizer=elements[index].weights[0])[0].item() for index in range(8)]
    normalizer = task.normalizer([0, 5])
    assert normalizer == 4.0
    both, _ = task.loss(model, [0, 5], normalizer=normalizer)
    assert both.item() == pytest.approx((single[0] + 3 * single[5]) / 4, rel=1e-5)


def test_a_refreshed_reward_model_is_judged_beside_the_one_before(policy: Path, tmp_path: Path) -> None:
    settings = (
        f"data.preferences.source={HERE}:kindness",
        "data.preferences.count=200",
        "learner.reward_model.num_epochs=6",
        "learner.reward_model.heldout_fraction=0.3",
        "rounds.gate.min_prompts=5",
        "learner.reward_model.optimizer.learning_rate=3e-3",
    )
    config = small_config(tmp_path, *settings)
    untrained = small_config(tmp_path, *settings, "learner.reward_model.optimizer.learning_rate=1e-9")
    first, second = tmp_path / "v000", tmp_path / "v001"
    train_reward_model(untrained, context(), job=job(config, policy=policy, output=first), report=lambda figures: None)
    wanted = job(config, policy=policy, output=second, round=2, incumbent=first)
    found = train_reward_model(config, context(), job=wanted, report=lambda figures: None)["gate"]
    assert found["passed"]
    assert found["gain"] > 0
    assert found["new"]["accuracy"] > 0.8
    assert found["incumbent"] == "v000"

    same = job(config, policy=policy, output=tmp_path / "v002", incumbent=second)
    found = train_reward_model(untrained, context(), job=same, report=lambda figures: None)["gate"]
    assert not found["passed"]
    assert found["gain"] < 0

"""Configurations: strict, explained, and equal after a round trip."""

from pathlib import Path

import pytest

from configs.load import PRESETS, ConfigError, config_hash, dump, load
from configs.rollout import RolloutConfig
from configs.run import RunConfig

PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_validates_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load(name)
    path = tmp_path / "copy.yaml"
    path.write_text(dump(config))
    assert load(path) == config
    assert config_hash(load(path)) == config_hash(config)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_says_how_to_run_it(name: str) -> None:
    header = (PRESETS / f"{name}.yaml").read_text().split("run:\n")[0]
    assert f"train {name}" in header


def test_there_are_the_four_presets() -> None:
    assert set(PRESET_NAMES) >= {"quickstart", "hh_pythia_1b_apa", "llama_8b_ppo_16xa100", "llama_70b_apa_multinode"}


def test_yaml_is_1_2() -> None:
    config = load("quickstart", ["learner.policy_optimizer.learning_rate=1e-6", "run.name=on"])
    assert config.learner.policy_optimizer.learning_rate == 1e-6
    assert config.run.name == "on"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.worker=3", "rollout.worker: unknown key; did you mean workers?"),
        ("learner.policy_optimizer.learning_rat=1", "learner.policy_optimizer.learning_rat: unknown key; did you mean"),
        ("algorithm.apa_lamda=1", "algorithm.apa_lamda: unknown key; did you mean apa_lambda?"),
        ("rollout.workers=two", "rollout.workers: Input should be a valid integer, not 'two'"),
        ("rollout.workers=1.5", "rollout.workers"),
        ("rollout.workers=0", "rollout.workers: Input should be greater than 0"),
        ("algorithm.minibatch_responses=33", "responses_per_iteration = 128 does not divide into minibatches"),
        ("rollout.top_p=0.9", "truncated distribution"),
        ("rollout.weight_transfer=nccl", "rollout.weight_transfer"),
        ("learner.micro_batch_tokens=50", "cannot hold one sequence"),
        ("rollout.max_response_tokens=400", "context_tokens = 128 is shorter"),
        ("scoring.rewards=[]", "scoring.rewards is empty"),
        ("algorithm.name=trpo", "algorithm.name: should be"),
        ("models.policy.path=x", "either models.policy.path or models.policy.scratch"),
        ("learner.workers=64", "some ranks would have nothing to do"),
        ("nonsense", "cannot read the override"),
        ("run.seed.x=1", "cannot set run.seed.x: seed is a value"),
        ("rollout.workers=[1", "cannot read the value"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("quickstart", [override])
    assert message in str(error.value)


def test_unknown_file_names_the_presets() -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load("nowhere.yaml")


def test_broken_yaml_and_empty_files_are_explained(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("run: {name: [")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="holds no sections"):
        load(tmp_path / "empty.yaml")


def test_the_hash_follows_the_content() -> None:
    assert config_hash(load("quickstart")) != config_hash(load("quickstart", ["run.seed=1"]))


def test_a_date_is_text_and_an_alias_is_what_it_stands_for(tmp_path: Path) -> None:
    assert load("quickstart", ["run.name=2024-13-45"]).run.name == "2024-13-45"
    text = (PRESETS / "quickstart.yaml").read_text()
    text = text.replace("policy_optimizer: {learn", "policy_optimizer: &same {learn")
    (tmp_path / "mine.yaml").write_text(
        text.replace("critic_optimizer: {learning_rate: 5e-4}", "critic_optimizer: *same")
    )
    learner = load(tmp_path / "mine.yaml").learner
    assert learner.critic_optimizer == learner.policy_optimizer


def test_a_typing_error_between_two_keys_names_both() -> None:
    with pytest.raises(ConfigError, match=r"did you mean top_k or top_p\?"):
        load("quickstart", ["rollout.top_=1"])


def test_a_long_value_is_cut_short_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"rollout: .* \(\d+ characters\)") as error:
        load("quickstart", [f"rollout={list(range(3000))}"])
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["01", "٢", "+1"])
def test_an_override_that_names_no_round_is_not_ignored(name: str) -> None:
    with pytest.raises(ConfigError, match="numbered from 1 to 2"):
        load("quickstart", [f"rounds.overrides.{name}.iterations=5"])


def test_an_endpoint_has_to_answer_before_its_worker_is_given_up() -> None:
    reward = [
        "models.critic.init=policy",
        "scoring.rewards=[{kind: http, name: a, url: 'http://h/', deadline_s: 60.0}]",
    ]
    reward += ["rounds.collect.comparisons=0", "rounds.overrides={}", "rounds.heldout_share=0.0"]
    with pytest.raises(ConfigError, match=r"deadline_s = 60 is not below cluster\.deadlines\.score_s = 60"):
        load("quickstart", [*reward, "cluster.deadlines.score_s=60"])
    assert load("quickstart", [*reward, "cluster.deadlines.score_s=61"]).cluster.deadlines.score_s == 61


def test_without_a_critic_there_is_no_need_of_a_reward_model_to_start_it_from() -> None:
    overrides = ["scoring.rewards=[{kind: function, name: a, path: 'm:f'}]", "rounds.collect.comparisons=0"]
    config = load("quickstart", [*overrides, "algorithm.advantage=reinforce", "rounds.count=1", "rounds.overrides={}"])
    assert not config.algorithm.has_critic
    assert config.algorithm.warmup_iterations == 0 < config.algorithm.critic_warmup_iterations
    with pytest.raises(ConfigError, match="models.critic.init is reward"):
        load("quickstart", [*overrides, "rounds.count=1", "rounds.overrides={}"])


_COMPARING = ("algorithm.name=dpo", "algorithm.name=rft", "algorithm.advantage=rloo", "algorithm.advantage=grpo")


@pytest.mark.parametrize(
    ("preset", "line"),
    [(preset, "algorithm.name=dpo") for preset in PRESET_NAMES] + [("quickstart", line) for line in _COMPARING[1:]],
)
def test_one_line_draws_siblings_and_leaves_the_number_of_responses(preset: str, line: str, tmp_path: Path) -> None:
    before, after = load(preset).rollout, load(preset, [line]).rollout
    assert (before.samples_per_prompt, after.samples_per_prompt) == (1, 4)
    assert before.responses_per_iteration == after.responses_per_iteration == 4 * after.prompts_per_iteration
    # What a run keeps has the number in it, is read back to the same, and is the same as by hand.
    (tmp_path / "config.yaml").write_text(dump(load(preset, [line])))
    assert "samples_per_prompt: 4" in (tmp_path / "config.yaml").read_text()
    assert config_hash(load(tmp_path / "config.yaml")) == config_hash(load(preset, [line]))
    assert config_hash(load(preset, [line, "rollout.samples_per_prompt=4"])) == config_hash(load(preset, [line]))


def test_a_number_of_samples_that_is_given_holds() -> None:
    for line in _COMPARING:
        assert load("quickstart", [line, "rollout.samples_per_prompt=2"]).rollout.prompts_per_iteration == 64
    assert load("quickstart", ["rollout.samples_per_prompt=4"]).rollout.prompts_per_iteration == 32
    with pytest.raises(ConfigError, match="rollout.samples_per_prompt = 1: sample at least two"):
        load("quickstart", ["rollout.samples_per_prompt=1", "algorithm.name=dpo"])


def test_a_section_that_is_made_in_code_has_the_number_too() -> None:
    whole = load("quickstart", ["algorithm.name=dpo"])
    parts = {name: getattr(whole, name) for name in ("run", "models", "data", "algorithm")}
    rollout = RunConfig(**parts, rollout=RolloutConfig(max_prompt_tokens=40, max_response_tokens=56)).rollout
    assert (rollout.samples_per_prompt, rollout.prompts_per_iteration) == (4, 64 / 4)


def test_a_switch_says_nothing_alarming_and_forgets_no_word_of_the_command(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    load("quickstart", ["algorithm.name=apa"])
    assert not caplog.records
    load("quickstart", ["algorithm.name=dpo"])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "algorithm.name = dpo instead of apa: the file's apa_lambda, critic_warmup_iterations not read")
    ]
    for overrides in (
        ["algorithm.apa_lambda=2", "algorithm.name=ppo"],
        ["algorithm.name=ppo", "algorithm.apa_lambda=2"],
    ):
        with pytest.raises(ConfigError, match=r"algorithm\.apa_lambda: unknown key"):
            load("quickstart", overrides)


def test_a_misspelt_key_of_the_file_is_refused_under_another_algorithm_too(tmp_path: Path) -> None:
    text = (PRESETS / "quickstart.yaml").read_text().replace("  minibatch_responses: 32", "  minibatch_response: 32")
    (tmp_path / "mine.yaml").write_text(text)
    for overrides in ([], ["algorithm.name=ppo"]):
        with pytest.raises(ConfigError, match=r"minibatch_response: unknown key; did you mean minibatch_responses\?"):
            load(tmp_path / "mine.yaml", overrides)


@pytest.mark.parametrize("name", ["ppo", "apa", "awr", "a2c"])
def test_one_line_switches_the_algorithm(name: str) -> None:
    config = load("quickstart", [f"algorithm.name={name}"])
    assert config.algorithm.name == name
    assert config.algorithm.minibatch_responses == 32
    assert config.algorithm.correction.weight == "none"
    assert config.algorithm.has_critic
    assert config.minibatches_per_epoch == 128 / 32


def test_one_line_switches_from_a_file_that_makes_two_passes_to_an_algorithm_of_one(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert load("hh_pythia_1b_apa").algorithm.num_epochs == 2
    assert load("hh_pythia_1b_apa", ["algorithm.name=ppo"]).algorithm.num_epochs == 2
    caplog.set_level("INFO")
    assert load("hh_pythia_1b_apa", ["algorithm.name=a2c"]).algorithm.num_epochs == 1
    assert any("a2c instead of apa: the file's" in text and "num_epochs" in text for text in caplog.messages)
    repeating = ["algorithm.adv_norm_over=minibatch", "algorithm.repeat_minibatch=true"]
    path = tmp_path / "repeating.yaml"
    path.write_text(dump(load("hh_pythia_1b_apa", repeating)))
    assert not load(path, ["algorithm.name=a2c"]).algorithm.model_dump()["repeat_minibatch"]
    with pytest.raises(ConfigError, match="num_epochs = 2: the loss of a2c has no ratio"):
        load("hh_pythia_1b_apa", ["algorithm.name=a2c", "algorithm.num_epochs=2"])


@pytest.mark.parametrize("name", ["ppo", "apa", "awr", "a2c"])
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_one_line_does_without_the_critic_where_its_keys_have_their_defaults(name: str, advantage: str) -> None:
    """As in a file that `dump` wrote, where every key stands."""
    spelled = [f"algorithm.gae_lambda={0.95}", f"algorithm.value_clip={0.2 if name == 'ppo' else 'null'}"]
    for extra in ([], ["algorithm.value_clip=null"]):
        config = load("quickstart", [f"algorithm.name={name}", *spelled, f"algorithm.advantage={advantage}", *extra])
        assert not config.algorithm.has_critic


@pytest.mark.parametrize(("name", "steps"), [("dpo", 2 * 32 // 32), ("rft", (32 + 64) // 32)])
def test_a_choice_among_responses_needs_no_critic_and_carries_no_key_of_one(name: str, steps: int) -> None:
    config = load("quickstart", [f"algorithm.name={name}"])
    assert (config.algorithm.has_critic, config.algorithm.warmup_iterations) == (False, 0)
    assert config.minibatches_per_epoch == steps
    keys = set(config.algorithm.model_dump())
    assert not keys & {"advantage", "gamma", "gae_lambda", "value_clip", "correction", "kl_beta", "aggregation"}
    uneven = load("quickstart", [f"algorithm.name={name}", "algorithm.minibatch_responses=50"])
    assert uneven.minibatches_per_epoch == 2


def test_a_wrong_value_inside_the_tagged_section_is_spelled_as_the_user_does() -> None:
    with pytest.raises(ConfigError, match=r"\n  algorithm\.kind: Input should be 'dpo', 'cdpo', 'robust' or 'ipo'"):
        load("quickstart", ["algorithm.name=dpo", "algorithm.kind=1"])

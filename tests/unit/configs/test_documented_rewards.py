"""docs/rewards.md: its commands and its YAML are taken as they stand, and its keys, numbers and refusals are true."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from configs.learner import RewardModelTrainingConfig
from configs.load import ConfigError, load
from configs.scoring import LinearCombination, MeanMinusStdCombination, MinimumCombination, SafetyFirstCombination
from configs.yaml_tree import parse
from learner.validation import validation_report
from protocol import metrics
from reward_service.combination import linear, mean_minus_std, minimum, safety_first
from tests.documentation import commands, dry_run, page, snippets

TEXT = page("rewards.md")
COMMANDS = commands(TEXT)
SNIPPETS = snippets(TEXT)
RULES = re.findall(r"^\| `(\{kind: .+?\})`", TEXT, flags=re.MULTILINE)
KINDS = {
    "linear": LinearCombination,
    "safety_first": SafetyFirstCombination,
    "minimum": MinimumCombination,
    "mean_minus_std": MeanMinusStdCombination,
}
TWO = "scoring.rewards=[{kind: model, name: helpful}, {kind: model, name: safe, path: /models/safety-rm}]"
FUNCTION = "scoring.rewards=[{kind: function, name: brief, path: 'my_rewards:brief'}]"
ALONE = "models.critic.init=policy"


def _http(rest: str) -> str:
    return f"scoring.rewards=[{{kind: http, name: judge, {rest}}}]"


def overrides(tree: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in tree.items() for key, value in keys.items()]


def assert_holds(found: object, said: object) -> None:
    """Check that what was loaded has every value that a snippet gives."""
    if isinstance(said, dict):
        for key, value in said.items():
            assert_holds(getattr(found, key), value)
    elif isinstance(said, list):
        assert isinstance(found, list)
        for one, value in zip(found, said, strict=True):
            assert_holds(one, value)
    else:
        assert found == said


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_accepted_as_it_stands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = dry_run(line)
    kind = re.search(r"kind=(\w+)|combine=\{kind: (\w+)", line)
    assert f"rewards ({'linear' if kind is None else kind[1] or kind[2]}): " in said
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_command_for_each_rule_and_it_is_a_dry_run() -> None:
    assert [line.split()[2] for line in COMMANDS] == [
        f"run.name={n}" for n in ("linear", "safety", "minimum", "ensemble")
    ]
    assert all(line.endswith(" --dry-run") for line in COMMANDS)


@pytest.mark.parametrize("text", SNIPPETS)
def test_a_snippet_is_loaded_with_all_that_it_says(text: str) -> None:
    tree = parse(text)
    assert_holds(load("quickstart", overrides(tree)), tree)


def test_there_are_snippets_of_every_kind_of_reward() -> None:
    assert len(SNIPPETS) == 3
    rewards = parse(SNIPPETS[0])["scoring"]["rewards"]
    assert [(r["kind"], r.get("path", "trained")) for r in rewards[:2]] == [
        ("model", "trained"),
        ("model", "/models/safety-rm"),
    ]
    assert [r["kind"] for r in rewards[2:]] == ["function", "http"]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_stands_with_its_defaults(rule: str) -> None:
    tree = parse(rule)
    fields = KINDS[tree["kind"]].model_fields
    assert tree.keys() == fields.keys()
    assert all(tree[key] == info.default for key, info in fields.items() if not info.is_required())
    assert_holds(load("quickstart", [TWO, f"scoring.combine={rule}"]).scoring.combine, tree)


def test_every_rule_and_every_loss_has_its_line() -> None:
    assert {parse(rule)["kind"] for rule in RULES} == set(KINDS)
    losses = re.findall(r"^\| `(\w+)`(?: \(default\))? \| (?:prompts|pairs)", TEXT, flags=re.MULTILINE)
    assert losses == ["k_choose_2", "pairwise", "plackett_luce"]
    assert RewardModelTrainingConfig.model_fields["loss"].default == losses[0]


def test_the_table_of_units_is_that_of_independent_normal_scores() -> None:
    # Both scores at the middles of equally likely bins: every pair of them, so neither drawn nor correlated.
    bins = (np.arange(1500) + 0.5) / 1500
    normal = ndtri(bins)
    a, b = (grid.ravel() for grid in np.meshgrid(normal, normal))
    both = {"a": a, "b": b}
    unrelated = linear(both, weights={"a": 1.0, "b": 1.0})
    same = linear({"a": a, "b": a}, weights={"a": 1.0, "b": 1.0})
    worst = minimum(both)
    gated = safety_first(a, b, about_safety=[False] * len(a), threshold=0.15)
    assert f"`sqrt(2 + 2 r)`: {unrelated.std():.2f} where they are unrelated, {same.std():.0f} where" in TEXT
    assert f"| `minimum`, independent and normal | {worst.mean():.2f} | {worst.std():.2f} |" in TEXT
    assert f"| `safety_first`, the same, no prompt tagged | {gated.mean():.2f} | {gated.std():.2f} |" in TEXT
    np.testing.assert_allclose(mean_minus_std(both, num_stds=1.0), worst, atol=1e-12)
    assert f"{-math.log(0.15 / 0.85):.2f} deviations below" in TEXT


def test_the_metrics_and_figures_that_it_speaks_of_exist() -> None:
    assert metrics.SCORE_PREFIX + "NAME" in TEXT
    for name in re.findall(r"`((?:score|objective)/[a-z_]+)`", TEXT):
        assert name in (metrics.OBJECTIVE_SCORE, metrics.HELDOUT_GAP, metrics.SCORE_PREFIX + "heldout")
    scores, sides = np.array([1.0, 0.0, 2.0, 0.5]), np.array([0, 2])
    report = validation_report(scores, better=sides, worse=sides + 1, response_tokens=np.array([3, 4, 5, 6]))
    spoken = ("accuracy", "nll_nats", "ece", "calibration", "accuracy_both_high", "length_correlation", "temperature")
    for name in spoken:
        assert f"`{name}`" in TEXT
        assert name in report


REFUSED = [
    (["scoring.combine.kind=minimum"], "two rewards or more"),
    ([TWO.replace("rm}", "rm, weight: 2}"), "scoring.combine.kind=mean_minus_std"], "weighs none"),
    ([TWO, "scoring.combine={kind: safety_first, helpfulness: helpful, safety: brief}"], "chooses between two"),
    (["scoring.rewards=[{kind: model, name: a}, {kind: model, name: a, path: b}]"], "two rewards of one name"),
    (["scoring.rewards=[{kind: model, name: heldout}]"], "the held-out reward model"),
    (["scoring.rewards=[]"], "is empty"),
    (["models.reward.init=none"], "models.reward.init is none"),
    (["data.preferences=null"], "needs data.preferences"),
    ([FUNCTION, "rounds.count=1"], "use policy"),
    ([FUNCTION, ALONE], "round 2 collects comparisons"),
    ([FUNCTION, ALONE, "rounds.count=1", "rounds.guards.heldout_gap=1"], "guards.heldout_gap"),
    (["learner.reward_model={loss: plackett_luce, margin: small}"], "no pairs"),
    (["scoring.length.buffer_tokens=56"], "free of charge"),
    ([_http("url: 'http://u:p@h/'"), ALONE], "has a password in it"),
    ([_http("url: 'http://h/?api_key=1'"), ALONE, "rounds.count=1"], "token_env"),
    ([_http("url: 'http://169.254.1.1/'"), ALONE, "rounds.count=1"], "link-local"),
    ([_http("url: 'http://h/', deadline_s: 600"), ALONE, "rounds.count=1"], "not below"),
    ([TWO.replace("path: /models/safety-rm", "path: trained"), "scoring.combine.kind=minimum"], "one trained"),
    ([FUNCTION.replace("]", ", {kind: model, name: a}]"), "scoring.combine.kind=minimum"], "one unit"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_it_calls_refused_is_refused(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load("quickstart", given)

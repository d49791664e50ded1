"""docs/methods.md: its commands are taken as they stand, and it names every method, every key and every metric."""

import re
from pathlib import Path

import pytest

from configs.algorithm import PolicyGradientBase, PPOConfig
from configs.load import load
from configs.selection import DPOConfig, RFTConfig
from protocol import metrics
from tests.documentation import commands, dry_run, page

TEXT = page("methods.md")
COMMANDS = commands(TEXT)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_accepted_as_it_stands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = dry_run(line)
    name = re.search(r"algorithm\.name=(\w+)", line)
    assert name is not None
    assert f"algorithm {name[1]}," in said


def test_there_is_a_command_for_each_kind_of_method() -> None:
    changes = [" ".join(line.split()[2:-1]) for line in COMMANDS]
    by_name = [f"algorithm.name={name}" for name in ("awr", "dpo", "rft")]
    assert changes == [*by_name, "algorithm.name=ppo algorithm.advantage=rloo"]


@pytest.mark.parametrize("name", ["ppo", "apa", "awr", "a2c", "dpo", "rft"])
def test_every_method_has_its_line(name: str) -> None:
    assert load("quickstart", [f"algorithm.name={name}"]).algorithm.name == name
    assert re.search(rf"^\| `{name}` \| .+ \| .+ \| .+ \|$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("section", [DPOConfig, RFTConfig])
def test_every_key_stands_with_its_default(section: type[DPOConfig | RFTConfig]) -> None:
    part = TEXT.split(f"## `{section.model_fields['name'].default}`")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    defaults = [word.strip(" `") for row in rows for word in row.split("|")[2].split(",")]
    fields = {key: info.default for key, info in section.model_fields.items() if key != "name"}
    assert dict(zip(keys, defaults, strict=True)) == {key: f"{default:g}" if isinstance(default, float) else
                                                      str(default) for key, default in fields.items()}  # fmt: skip


def test_the_keys_of_other_codes_stand_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(adv_norm_over|repeat_minibatch|kl_estimator)`.*? \| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    defaults = {key: str(PPOConfig.model_fields[key].default).lower() for key, _ in rows}
    assert len(rows) == 3
    assert dict(rows) == defaults


@pytest.mark.parametrize("key", ["score_at", "whiten_rewards", "truncated_value", "alarm_negative_kl"])
def test_a_choice_of_rewards_and_responses_stands_with_its_default(key: str) -> None:
    row = re.search(rf"^\| `{key}` \| `?(\w+)`? \| .+ \|$", TEXT, flags=re.MULTILINE)
    assert row is not None
    assert row[1] == str(PolicyGradientBase.model_fields[key].default).lower()


def test_the_metrics_that_it_speaks_of_exist() -> None:
    known = {value for name, value in vars(metrics).items() if name.isupper()}
    spoken = set(re.findall(r"`((?:dpo|rft|objective|policy|sync)/\w+)`", TEXT))
    assert len(spoken) > 8
    assert spoken <= known

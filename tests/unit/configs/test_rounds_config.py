"""Rounds: overrides change single values, and what cannot work is refused before anything starts."""

import pytest

from configs.load import ConfigError, dump, load

TWO = ("rounds.collect.comparisons=800", "rounds.collect.temperatures=[1.3]", "rounds.guards.kl_nats_per_sequence=9.0")


def test_an_override_keeps_what_it_does_not_name() -> None:
    config = load(
        "quickstart", [*TWO, 'rounds.overrides={"2": {collect: {comparisons: 400}, guards: {entropy_nats: 0.1}}}']
    )
    first, second = config.rounds.of(1), config.rounds.of(2)
    assert (first.collect.comparisons, second.collect.comparisons) == (800, 400)
    assert second.collect.temperatures == [1.3]
    assert second.collect.responses_per_task == first.collect.responses_per_task == 4
    assert (second.guards.kl_nats_per_sequence, second.guards.entropy_nats) == (9.0, 0.1)


def test_a_written_configuration_reads_as_the_same_plan(tmp_path) -> None:
    config = load("quickstart", [*TWO, 'rounds.overrides={"2": {collect: {comparisons: 400}}}'])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert [load(path).rounds.of(number) for number in (1, 2)] == [config.rounds.of(number) for number in (1, 2)]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rounds.evaluation.opponents=[v777]"], "v777"),
        (["rounds.init_policy=v020"], "round 1 names policy v020"),
        (["rounds.collect.policies=[sft, current, best]", "rounds.collect.responses_per_task=2",
          "rounds.collect.samples_per_prompt=2"], "less than the 3 policies"),
        (["rounds.guards.heldout_gap=0.5", "rounds.heldout_share=0"], "held-out reward model"),
        (["rounds.refresh=false"], "no reward model learns"),
        (["rounds.collect.comparisons=50"], "min_prompts"),
        (["rounds.overrides={'3': {}}"], "numbered from 1 to 2"),
        (["rounds.labeler=null"], "who labels"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load("quickstart", overrides)


def test_a_version_that_will_be_there_may_be_named() -> None:
    assert (
        load(
            "quickstart", ['rounds.overrides={"1": {collect: {comparisons: 0}}, "2": {init_policy: v020}}']
        ).rounds.count
        == 2
    )


def test_the_longest_schedule_is_read_back_from_what_a_run_writes(tmp_path) -> None:
    """A short file grows when it is written with every default of every round."""
    people = "{kind: people, check_period: 5, checks: {source: checks.jsonl}}"
    each = (
        f"{{collect: {{comparisons: 400}}, labeler: {people}, mixture: {{newest: 2.0}}, guards: {{entropy_nats: 0.1}}}}"
    )
    overrides = ", ".join(f"'{number}': {each}" for number in range(1, 501))
    config = load("quickstart", ["rounds.count=500", f"rounds.overrides={{{overrides}}}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config

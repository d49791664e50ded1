"""The report: one page that stands alone, for finished and unfinished runs, whatever the models said."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.report import write_report
from cluster.report_charts import Axis, Point, Series, round_numbers, xy_chart
from cluster.report_judgement import wilson
from cluster.report_origins import flattened, without_secrets
from cluster.report_parts import clipped, duration, number, signed, spread
from cluster.report_record import read_record
from cluster.run_directory import RunDirectory, claim
from cluster.schedule import Phase, RunState
from configs.addresses import HIDDEN
from configs.run import RunConfig
from protocol.files import write_json
from reward_service.preferences.store import PreferenceStore
from tests.written_run import write_metrics, write_run, written_config

ROOT = Path(__file__).parents[3]
VOID = {"meta", "link", "br", "img", "input", "hr"}
HEADINGS = [
    "Summary",
    "Rounds",
    "The ladder",
    "The same prompts, answered by each version",
    "Reward and KL",
    "Gold score for the KL that was spent",
    "Reward models",
    "Labels",
    "Response lengths",
    "How the policy writes",
    "Throughput",
    "Incidents and alarms",
    "Lineage",
    "All metrics",
    "Configuration",
]
HOSTILE = (
    "<script>document.title='owned'</script></div></main><img src=x onerror=alert(1)> ![p](http://evil.example/p.png) "
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; \x00\x1b[31m \u202eabc\u2066 \ud800 </style><style>*{display:none}</style>"
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text.strip() for name, text in self.texts if name == tag and text.strip()]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(text for name, text in self.texts if name != "style"))


def reported(directory: RunDirectory, config: RunConfig) -> str:
    if not directory.preferences.exists():
        return write_report(directory, config, None).read_text(encoding="utf-8")
    with closing(PreferenceStore.open(f"sqlite:///{directory.preferences}", create=False)) as store:
        return write_report(directory, config, store).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = written_config(tmp_path_factory.mktemp("runs"))
    return reported(write_run(config), config)


def test_a_finished_run_shows_every_section_well_formed(finished: str) -> None:
    page = Page(finished)
    assert page.said("h2") == HEADINGS
    assert len(page.ids) == len(set(page.ids))
    assert {a["href"] for a in page.of("a")} <= {f"#{name}" for name in page.ids}
    assert "nan" not in re.sub(r"advantages.*?are nan", "", page.text).lower().split()
    assert len(finished) < 400_000


def test_the_page_needs_nothing_from_anywhere(finished: str) -> None:
    page = Page(finished)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "a:href"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")]
    assert "url(" not in finished
    assert "@import" not in finished
    assert "http://" not in finished
    assert "https://" not in finished


def test_the_content_policy_admits_the_one_style_sheet_alone(finished: str) -> None:
    policy = next(a["content"] for a in Page(finished).of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", finished, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_figures_and_tables_can_be_read_without_eyes(finished: str) -> None:
    page = Page(finished)
    charts = [svg for svg in page.of("svg") if svg.get("aria-hidden") != "true"]
    assert len(charts) == len(page.of("figure")) >= 14
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 40 for svg in charts)
    assert len(page.of("caption")) == len(page.of("table")) >= 12
    assert all(th["scope"] in ("col", "row") for th in page.of("th"))
    assert page.of("html") == [{"lang": "en"}]


def test_the_summary_says_what_happened_to_somebody_who_was_not_there(finished: str) -> None:
    text = Page(finished).text
    for sentence in (
        "On 256 held-out prompts v041 is better than SFT: it wins 80% of the time (95% interval 75% to 85%), judged by "
        "the gold score, whose mean went from −0.21 to +0.80.",
        "40 tasks (40 pairs) collected in round 2 and judged by simulated labelers",
        "round 2, 500 tasks, 3,000 pairs",
        "Round 2 was stopped by a guard after 20 iterations: KL (nats a sequence) = 12.3 is above its bound of 12.",
        "The reward model promises more for v041 than was measured: +260 Elo over v020 against +98 (+40 to +158).",
        "1 incident recorded",
        "On the ladder the best version is v041",
    ):
        assert sentence in text


def test_an_incident_comes_with_the_command_that_shows_it(finished: str) -> None:
    assert "rondo incident show <i>nonfinite</i>.json" in Page(finished).said("td")


def test_the_win_matrix_is_the_ladders_and_its_mirror_image(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = write_run(config)
    pairs = json.loads(directory.ladder.read_text())["pairs"]
    pair = next(p for p in pairs if {p["version"], p["over"]} == {"v041", "v000"})
    rate = round(100 * (pair["wins"] + 0.5 * pair["ties"]) / pair["num_comparisons"])
    matrix = reported(directory, config).split("<caption>Win matrix")[1].split("</table>")[0]
    assert f">{rate}%<" in matrix
    assert f">{100 - rate}%<" in matrix


def test_labels_are_counted(finished: str) -> None:
    text = Page(finished).text
    # 40 tasks of each of four kinds, two labels each; every tenth is a tie: 4 of 40.
    assert "round 2, for the reward model 40 72 8 0 0 0 10.0%" in text
    assert "160 tasks, 320 labels that stand." in text
    # The second labeler differs on every seventh task (0, 7, ..., 154: 23 tasks), but not where it is a tie (49, 119).
    assert f"labelers agree {100 * (160 - 21) / 160:.0f}% of the time" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, answers={"v041": HOSTILE + "x" * 1_000_000})
    html = reported(directory, config)
    page = Page(html)
    assert not page.of("script")
    assert not page.of("img")
    assert len(page.of("style")) == 1
    assert "<script>document.title='owned'</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "␀␛[31m ⟨U+202E⟩abc⟨U+2066⟩ \N{REPLACEMENT CHARACTER}" in page.text
    assert "more characters)" in page.text
    assert len(html) < 1_000_000


def test_secrets_do_not_appear(finished: str) -> None:
    assert "sk-hush" not in finished
    tree = {
        "api_key": "a",
        "token_env": "WANDB_KEY",
        "max_response_tokens": 56,
        "judge": [{"bearer_token": "b", "Authorization": "c", "url": "d"}],
        "password": None,
        "accessKey": "e",
    }
    assert without_secrets(tree) == {
        "api_key": HIDDEN,
        "token_env": "WANDB_KEY",
        "max_response_tokens": 56,
        "judge": [{"bearer_token": HIDDEN, "Authorization": HIDDEN, "url": "d"}],
        "password": None,
        "accessKey": HIDDEN,
    }


def test_passwords_in_addresses_do_not_appear(tmp_path: Path) -> None:
    # No configuration is loaded with one; this one says it all the same.
    config = written_config(tmp_path)
    prompts = config.data.prompts.model_copy(update={"source": "https://ada:hush@127.0.0.1:8000/prompts"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompts": prompts})})
    html = write_report(claim(written_config(tmp_path)), config, None).read_text(encoding="utf-8")
    assert "ada:(hidden)@127.0.0.1:8000/prompts" in html
    assert "hush" not in html


def test_a_run_that_has_just_begun_says_what_will_come(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    page = Page(reported(claim(config), config))
    assert page.said("h2") == [title for title in HEADINGS if title != "All metrics"]
    assert page.of("figure") == []
    assert "Nothing has been recorded yet" in page.text
    assert "The ladder appears when a round's policy has been compared" in page.text
    assert "Whether it got better is known after the first round's evaluation." in page.text


def test_a_run_in_the_middle_of_its_first_round(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = claim(config)
    write_metrics(directory, num_rounds=1, num_iterations=7)
    with directory.metrics.open("a") as file:
        file.write('{"counter/round": 1, "counter/it')  # the driver is writing
    write_json(directory.state, RunState(phase=Phase.OPTIMISE, iteration=0).to_json())
    page = Page(reported(directory, config))
    assert "Not finished: round 1 of 2, optimising the policy (7 of 20 iterations)." in page.text
    assert "Because 7." in page.text  # answers sampled while training stand in for the evaluation's
    assert len(page.of("figure")) == 11


@pytest.mark.parametrize(
    "name",
    [
        "ladder.json",
        "evaluation.json",
        "lineage.json",
        "metrics.jsonl",
        "preferences.db",
        "samples.jsonl",
        "state.json",
        "rounds/r002/round.json",
        "rounds/r001/refresh.json",
    ],
)
def test_any_file_may_be_missing(tmp_path: Path, name: str) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, num_prompts=4)
    (directory.root / name).unlink()
    page = Page(reported(directory, config))
    assert "cannot be read" not in page.text
    assert len(page.of("section")) >= 8  # the rest of the report stands


@pytest.mark.parametrize(
    ("name", "text"), [("ladder.json", "{}"), ("lineage.json", "[1"), ("state.json", '{"phase": 3}')]
)
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, name: str, text: str) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, num_prompts=4)
    directory.finished.unlink()
    (directory.root / name).write_text(text)
    assert f"{name} cannot be read" in Page(reported(directory, config)).text


def test_a_run_of_one_iteration_that_has_not_moved(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = claim(config)
    write_metrics(directory, num_rounds=1, num_iterations=1)
    line = json.loads(directory.metrics.read_text())
    directory.metrics.write_text(json.dumps({k: v if k.startswith("counter") else 0.0 for k, v in line.items()}) + "\n")
    assert len(Page(reported(directory, config)).of("figure")) == 11


def test_a_policy_that_is_not_promoted_and_a_gate_that_closes_are_said(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, num_prompts=4)
    ladder = json.loads(directory.ladder.read_text())
    changed = {"best": "v000", "position_bias": None, "length_controlled": None}
    write_json(directory.ladder, ladder | changed)
    ended = json.loads(directory.round_report(2).read_text())
    write_json(directory.round_report(2), ended | {"best_version": 20, "reward_version": 0})
    write_json(directory.refreshed(2), {"reward_version": 0, "why": "the old reward model stays: gain in nll -0.010"})
    text = Page(reported(directory, config)).text
    assert "Round 2's policy v041 was not promoted: v020 stayed the best." in text
    assert "Round 2's new reward model did not pass its gate, so v000 went on scoring." in text
    assert "On the ladder no version is ahead of SFT beyond doubt, so v000 stays the best of 3." in text


def test_a_gate_that_could_not_tell_is_shown_with_its_reason(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, num_prompts=4)
    path = directory.root / "reward_models" / "v001" / "reward_model_report.json"
    undecided = {"incumbent": "v000", "pairs": "newest", "passed": False, "num_prompts": 3, "why": "3 are too few"}
    write_json(path, json.loads(path.read_text()) | {"gate": undecided})
    write_json(directory.refreshed(2), {"reward_version": 0, "why": "the old reward model stays: 3 are too few"})
    assert "the old reward model stays: 3 are too few" in Page(reported(directory, config)).text


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = claim(config)
    write_metrics(directory, num_rounds=1, num_iterations=4)
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    lines[2] |= {"objective/kl_k1_per_sequence": float("nan"), "gold/gold": float("inf")}
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = reported(directory, config)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)


def test_a_long_run_is_drawn_by_means_of_neighbours(tmp_path: Path) -> None:
    config = written_config(tmp_path, "rounds.iterations=1000")
    directory = claim(config)
    write_metrics(directory, num_rounds=2, num_iterations=1000)
    record = read_record(directory, config, None)
    first = [json.loads(line)["objective/score"] for line in directory.metrics.read_text().splitlines()[:7]]
    assert len(record.moments) == 286  # 2 x 143 groups of 7
    assert record.moments[0].metrics["objective/score"] == pytest.approx(sum(first) / 7)
    assert record.moments[0].place == 4.0
    html = reported(directory, config)
    assert "Each point of a chart is the mean of 7 iterations." in html
    assert len(html) < 400_000


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = write_run(config, num_prompts=4)
    first = reported(directory, config)
    assert reported(directory, config) == first
    assert [path.name for path in directory.root.glob("report*")] == ["report.html"]


def test_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys, cluster.report; heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'scipy'} & "
        "set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (-0.2, 9.6, (0, 2, 4, 6, 8)),
        (-13, 290, (0, 50, 100, 150, 200, 250)),
        (0.0012, 0.0031, (0.0015, 0.002, 0.0025, 0.003)),
    ],
)
def test_ticks_stand_at_round_numbers(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert round_numbers(low, high) == expected


def test_an_axis_of_equal_values_has_room() -> None:
    axis = Axis.over([3.0, 3.0], "tokens")
    assert (axis.low, axis.high) == (2.7, 3.3)
    assert (Axis.over([0.0], "share", include=(0.0,)).low, Axis.over([0.0], "share", include=(0.0,)).high) == (0.0, 1.0)
    assert Axis.over([], "none").ticks == (0, 0.2, 0.4, 0.6, 0.8, 1)


def test_a_line_goes_through_its_points_and_names_are_escaped() -> None:
    axis = Axis(label="<x>", low=0.0, high=10.0, ticks=(0.0, 10.0))
    runs = ((Point(x=0, y=0, label='"<b>'), Point(x=10, y=10)),)
    svg = xy_chart([Series(name="s", style=1, runs=runs)], x=axis, y=axis, alternative='say "<hi>"')
    assert 'd="M56 204L426 26"' in svg
    assert "<title>&#34;&lt;b&gt;</title>" in svg
    assert "<x>" not in svg
    assert 'aria-label="say &#34;&lt;hi&gt;&#34;"' in svg


def test_wilsons_interval() -> None:
    # 8 of 10: Wilson (1927), as in Newcombe (1998).
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)


def test_how_numbers_are_written() -> None:
    assert [number(-1234.567, 1), number(None), number(float("nan"))] == ["−1,234.6", "–", "–"]
    assert [signed(0.004), signed(-0.004), signed(0.5)] == ["0.00", "0.00", "+0.50"]
    assert [duration(4.691), duration(150), duration(9000)] == ["4.69 s", "2 min", "2 h 30 min"]
    assert clipped("a\x00b" * 2, 4) == "a␀ba\n… (2 more characters)"
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert flattened({"a": {"b": 1e-6, "c": []}, "d": [{"e": "f"}]}, "x") == [
        ("x.a.b", "1e-06"),
        ("x.a.c", "[]"),
        ("x.d[0].e", "f"),
    ]


def test_pairs_are_drawn_where_some_were_learned(finished: str, tmp_path: Path) -> None:
    config = written_config(tmp_path, "algorithm.name=dpo")
    directory = claim(config)
    write_metrics(directory, num_rounds=1)
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    for place, line in enumerate(lines):
        # The margin grows while both sides fall; the third iteration had no pair.
        pairs = {"dpo/margin_nats": 0.1 * place, "dpo/chosen_log_ratio_per_sequence": -0.2 * place}
        line |= {} if place == 2 else pairs | {"dpo/rejected_log_ratio_per_sequence": -0.3 * place}
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(directory, config, None).read_text(encoding="utf-8"))
    [chart] = [svg["aria-label"] for svg in page.of("svg") if "Pairs" in (svg.get("aria-label") or "")]
    assert "better" in chart
    assert "-3.8" in chart.replace("−", "-")  # where the better responses end
    assert "Pairs: log-ratio to the reference" not in finished

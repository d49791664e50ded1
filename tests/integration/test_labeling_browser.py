"""The labeling page in a real browser: by keyboard, by touch, offline, without script, and under an accessibility
audit."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from tests.integration.labeling_site import SECRETS, RunningSite, running_site, task

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DESK: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
PROSE = (
    "The sky looks blue because air scatters short waves of sunlight much more strongly than long ones.\n\n"
    "At sunset the light takes a longer way through the air, so most of the blue is gone before it reaches you:\n"
    "- short waves (blue): scattered a lot\n- long waves (red): pass almost straight through",
    "Because it reflects the ocean.\n\n"
    "```python\ndef sky(colour: str = 'blue') -> str:\n    return f'It is {colour}'\n```\n"
    "That is all there is to it.",
    "Nobody knows.",
    "سماء زرقاء لأن الهواء يشتت الضوء الأزرق أكثر من غيره.",
    "空が青いのは、空気が青い光を散乱させるからです。",
)
QUESTION = [
    {"role": "system", "content": "You are a patient teacher."},
    {"role": "user", "content": "Why is the sky blue? Explain it to a ten-year-old in a few sentences."},
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium or Chrome is installed (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Machines without a display have neither a graphics card nor much shared memory.
    arguments = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


Enter = Callable[..., Page]


@pytest.fixture
def enter(browser: Browser) -> Iterator[Enter]:
    """Come in by an invite link; whatever the browser complains about fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def come_in(site: RunningSite, *, admin: bool = False, failing_requests: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{**DESK, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        if not failing_requests:
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith(site.url) else complaints.append(request.url))
        page.goto(site.invite("Ana", admin=admin))
        return page

    yield come_in
    for context in contexts:
        context.close()
    assert complaints == []


def ticket(page: Page) -> str:
    return page.locator("[name=ticket]").input_value()


def submit_by(page: Page, act: Callable[[], None]) -> None:
    """Do something that submits, and wait for the page after it."""
    with page.expect_event("load"):
        act()


def keys(page: Page, pressed: str) -> None:
    for key in pressed.split():
        page.keyboard.press(key)


def shot(page: Page, folder: Path, name: str) -> None:
    for _ in range(3):  # on a busy machine Chromium gives up on a picture now and then
        with contextlib.suppress(PlaywrightError):
            page.screenshot(path=folder / f"{name}.png")
            return
    raise AssertionError(f"no picture of {name} after three tries")


# --- By keyboard -----------------------------------------------------------------------------------------------------


def test_twenty_tasks_by_keyboard_alone(tmp_path: Path, enter: Enter) -> None:
    told = ("1", "2", "1 3", "2 4", "2 5", "t", "b", "s ArrowDown ArrowDown", "1 2", "n h i Escape 2")
    with running_site(tmp_path, [task(n) for n in range(20)]) as site:
        page = enter(site)
        for number in range(20):
            keys(page, told[number % 10])
            submit_by(page, lambda: page.keyboard.press("Enter"))
        # Two were skipped, so somebody else has to answer them.
        expect(page.get_by_role("heading", name="Nothing for you right now")).to_be_visible()
        said = [
            (label.outcome.verdict, label.outcome.strength, label.outcome.reason, label.note)
            for label in site.store.labels()
        ]
        assert said[:10] == [
            ("preference", None, None, ""),
            ("preference", None, None, ""),
            ("preference", 1, None, ""),
            ("preference", 2, None, ""),
            ("preference", 3, None, ""),
            ("tie", None, None, ""),
            ("both_bad", None, None, ""),
            ("skip", None, "language", ""),
            ("preference", None, None, ""),
            ("preference", None, None, "hi"),
        ]
        assert said[10:] == said[:10]
        sides = [
            None if label.outcome.winner is None else 1 + label.presented.index(label.outcome.winner)
            for label in site.store.labels()
        ]
        assert sides[:10] == [1, 2, 1, 2, 2, None, None, None, 2, 2]


def test_a_ranking_by_keyboard_alone(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1, *"abcd"), task(2, *"efgh"), task(3, *"ijk")]) as site:
        page = enter(site)
        keys(page, "2 1 2 4")
        expect(page.locator("#order")).to_have_text("Best first: 2  ›  1 = 3  ›  4")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        keys(page, "1 2 3 4 k k 1")
        expect(page.locator("#order")).to_have_text("Best first: 1 = 2  ›  3  ›  4")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        keys(page, "t")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        first, second, third = site.store.labels()
        a, b, c, d = first.presented
        assert first.outcome.ranking == ((b,), (a, c), (d,))
        a, b, c, d = second.presented
        assert second.outcome.ranking == ((a, b), (c,), (d,))
        assert third.outcome.verdict == "tie"


def test_what_is_missing_is_said_and_nothing_is_sent(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1)], ask_ratings=True) as site:
        page = enter(site)
        status = page.get_by_role("status")
        keys(page, "Enter")
        expect(status).to_have_text("Choose one of the answers first.")
        keys(page, "1 Enter")
        expect(status).to_have_text("Rate response 1.")
        keys(page, "ArrowRight Tab Tab Tab")
        assert page.evaluate("document.activeElement.name") is not None
        keys(page, "s Enter")
        expect(status).to_have_text("Say why you skip it.")
        assert site.store.labels() == []


def test_tab_reaches_everything_visibly_and_is_never_trapped(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        page = enter(site)
        keys(page, "1")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        seen: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    """() => {
                        const one = document.activeElement;
                        if (one === document.body) return "body";
                        const ring = getComputedStyle(one.matches("label > input") ? one.parentElement : one);
                        return `${one.name || one.id || one.className || one.textContent.trim()} ${ring.outlineStyle}`;
                    }"""
                )
            )
        assert seen.index("body") < 40
        assert all(one == "body" or one.endswith("solid") for one in seen), seen
        names = {one.rsplit(" ", 1)[0] for one in seen}
        assert {"skip-link", "undo", "show-help", "text", "flag-1", "flag-2", "choice", "action"} <= names


def test_help_opens_closes_and_can_switch_keys_off(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        page = enter(site)
        keys(page, "?")
        dialog = page.get_by_role("dialog", name="Keys")
        expect(dialog).to_be_visible()
        keys(page, "1 Escape")
        expect(dialog).to_be_hidden()
        assert page.locator("[name=choice]:checked").count() == 0
        keys(page, "?")
        page.get_by_label("Use single-letter keys").uncheck()
        keys(page, "Escape 1")
        assert page.locator("[name=choice]:checked").count() == 0


# --- By touch --------------------------------------------------------------------------------------------------------


def test_twenty_tasks_by_touch_on_a_phone(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(n, *PROSE[:2], prompt=QUESTION) for n in range(20)]) as site:
        page = enter(site, **PHONE)
        for number in range(20):
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            page.locator(".choice label").nth(number % 4).tap()
            if number % 4 < 2 and number % 3:
                page.locator(".strength label").nth(number % 3).tap()
            if number % 5 == 4:
                page.locator(".skip summary").tap()
                page.locator(".reasons label").nth(1).tap()
                submit_by(page, page.get_by_role("button", name="Skip this task").tap)
            else:
                submit_by(page, page.get_by_role("button", name="Submit").tap)
        said = [label.outcome.verdict for label in site.store.labels()]
        assert said == [
            "skip" if n % 5 == 4 else ("preference", "preference", "tie", "both_bad")[n % 4] for n in range(20)
        ]
        assert [label.outcome.strength for label in site.store.labels()][:6] == [None, 2, None, None, None, 3]


def test_a_ranking_by_touch_on_a_phone(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1, *PROSE, prompt=QUESTION)]) as site:
        page = enter(site, **PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for number, place in enumerate((5, 4, 3, 2, 1), start=1):
            page.locator(f"#response-{number} .places label").nth(place - 1).tap()
        submit_by(page, page.get_by_role("button", name="Submit").tap)
        [label] = site.store.labels()
        assert label.outcome.ranking == tuple((candidate,) for candidate in reversed(label.presented))


def test_what_is_tapped_is_large_enough(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1, *PROSE[:2])], ask_ratings=True) as site:
        page = enter(site, **PHONE)
        page.locator(".choice label").first.tap()
        sizes = page.evaluate(
            """() => [...document.querySelectorAll("form label, form button, form summary, nav a, nav button")]
                .map((one) => one.getBoundingClientRect()).filter((box) => box.width > 0)
                .map((box) => [box.width, box.height])"""
        )
        assert min(width for width, _ in sizes) >= 36
        assert min(height for _, height in sizes) >= 36


# --- Undo, offline, no script ----------------------------------------------------------------------------------------


def test_undo_shows_the_answer_and_changes_it(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        page = enter(site)
        keys(page, "1 4")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        submit_by(page, lambda: page.keyboard.press("u"))
        expect(page.get_by_text("You are changing your last answer")).to_be_visible()
        expect(page.locator("[name=choice][value='1']")).to_be_checked()
        expect(page.locator("[name=strength][value='2']")).to_be_checked()
        keys(page, "t")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        expect(page.get_by_text("Question number 2?")).to_be_visible()
        first, second = site.store.labels(standing_only=False)
        assert (second.supersedes, second.outcome.verdict) == (first.label_id, "tie")


def test_an_answer_given_offline_arrives_once(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1), task(2), task(3)]) as site:
        page = enter(site, failing_requests=True)
        page.context.set_offline(True)
        keys(page, "2 Enter")
        status = page.get_by_role("status")
        expect(status).to_contain_text("No connection. Your answer is kept on this device")
        keys(page, "Enter Enter")
        page.wait_for_timeout(1500)
        assert site.store.labels() == []
        submit_by(page, lambda: page.context.set_offline(False))
        expect(page.get_by_text("Question number 2?")).to_be_visible()
        [label] = site.store.labels()
        assert label.outcome.winner == label.presented[1]
        assert page.evaluate("localStorage.length") == 0


def test_an_answer_outlives_the_tab(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        page = enter(site, failing_requests=True)
        page.context.set_offline(True)
        keys(page, "1 Enter")
        expect(page.get_by_role("status")).to_contain_text("kept on this device")
        later = page.context.new_page()
        page.close()
        page.context.set_offline(False)
        later.goto(site.url)
        expect(later.get_by_text("Question number 2?")).to_be_visible()
        assert [label.outcome.verdict for label in site.store.labels()] == ["preference"]


def test_a_refused_answer_is_explained_and_the_next_task_offered(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1)], lease_s=0.6) as site:
        page = enter(site, failing_requests=True)
        page.wait_for_timeout(700)
        keys(page, "1 Enter")
        expect(page.get_by_role("status")).to_contain_text("time for this task is over")
        expect(page.get_by_role("link", name="Go on with the next task")).to_be_focused()


def test_without_script_the_form_is_a_form(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1), task(2, *"abc")]) as site:
        page = enter(site, java_script_enabled=False)
        page.locator(".choice label").nth(1).click()
        page.get_by_role("button", name="Submit").click()
        for number, place in ((1, 2), (2, 1), (3, 3)):
            page.locator(f"#response-{number} .places label").nth(place - 1).click()
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("heading", name="All done")).to_be_visible()
        pair, ranking = site.store.labels()
        assert pair.outcome.winner == pair.presented[1]
        assert ranking.outcome.ranking == tuple((ranking.presented[place],) for place in (1, 0, 2))


def test_a_link_in_a_mail_leads_to_the_page(tmp_path: Path, enter: Enter) -> None:
    with running_site(tmp_path, [task(1, overlap=2)]) as site:
        page = enter(site, failing_requests=True)  # the first one comes without the cookie
        page.context.clear_cookies()
        page.goto("about:blank")
        page.set_content(f'<a href="{site.invite("Bo")}">Label, please</a>')
        page.get_by_role("link").click()
        expect(page.get_by_text("Question number 1?")).to_be_visible()
        assert page.url == f"{site.url}/"


# --- Hostile texts, secrets ------------------------------------------------------------------------------------------


def test_hostile_texts_change_nothing(tmp_path: Path, enter: Enter) -> None:
    hostile = (
        "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>",
        "![look](https://evil.example/pixel.png)\n</div></section></form><form action='//evil.example'>",
        "\u202egnp.exe\u2066 after\0nul",
        "long " * 200_000,
        "x" * 1_000_000,
    )
    with running_site(tmp_path, [task(1, *hostile, prompt="\u202eWhy?")]) as site:
        page = enter(site)
        shown = page.locator(".response .text").all_text_contents()
        assert {hostile[0], hostile[1], "⟨U+202E⟩gnp.exe⟨U+2066⟩ after␀nul"} <= {text.strip() for text in shown}
        assert sorted(len(text.strip()) for text in shown)[-2:] == [999_999, 1_000_000]
        assert page.locator("form").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= 1440
        boxes = page.locator(".response .text").evaluate_all("(all) => all.map((one) => one.clientHeight)")
        assert max(boxes) < 600
        keys(page, "1 2 3 4 5")
        shot(page, tmp_path, "hostile")
        submit_by(page, lambda: page.keyboard.press("Enter"))
        assert len(site.store.labels()[0].outcome.ranking) == 5


def test_no_traffic_tells_a_secret(tmp_path: Path, enter: Enter) -> None:
    with running_site(
        tmp_path, [task(1), task(2, purpose="evaluation"), task(3, purpose="check")], check_period=1
    ) as site:
        page = enter(site)
        told: list[str] = []

        def overhear(route: Route) -> None:
            request, reply = route.request, route.fetch(max_redirects=0)
            told.append(f"{request.url} {request.post_data} {request.all_headers()}")
            told.append(f"{reply.headers} {'' if '/static/' in request.url else reply.text()}")
            route.fulfill(response=reply)

        page.context.route("**/*", overhear)
        for _ in range(3):
            keys(page, "t")
            submit_by(page, lambda: page.keyboard.press("Enter"))
        expect(page.get_by_role("heading", name="All done")).to_be_visible()
        # What is under way is answered before the browser closes; an answer after that would fail another test.
        page.context.unroute_all(behavior="wait")
        assert len(told) > 10
        everything = " ".join(told).lower()
        for header in ("content-security", "permissions", "referrer", "cross-origin-opener", "cross-origin-resource"):
            everything = everything.replace(f"{header}-policy", "")
        assert [word for word in SECRETS if word in everything] == []


# --- Accessibility ---------------------------------------------------------------------------------------------------


def serious(page: Page) -> list[tuple[str, list[str]]]:
    """Audit the page; return what is serious or worse."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        (one["id"], [node["html"][:120] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", ["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_barrier_on_any_page(tmp_path: Path, enter: Enter, scheme: str, size: str) -> None:
    options = {**(PHONE if size == "phone" else DESK), "color_scheme": scheme}
    tasks = [
        task(1, *PROSE[:2], prompt=QUESTION, overlap=2),
        task(2, *PROSE, prompt=QUESTION, overlap=2),
        task(3, purpose="check", overlap=3),
    ]
    with running_site(tmp_path, tasks, ask_ratings=size == "phone") as site:
        page = enter(site, admin=True, **options)
        shot(page, tmp_path, f"pair-{size}-{scheme}")
        assert serious(page) == []
        for _ in range(2):
            if page.locator("[name=rating-1]").count():
                for box in page.locator(".rating").all():
                    box.locator("label").nth(4).click()
            page.locator(".chips label").nth(3).click()
            page.locator(".skip summary").click()
            shot(page, tmp_path, f"skip-{size}-{scheme}")
            assert serious(page) == []
            page.locator(".skip summary").click()
            if page.locator(".places").count():
                shot(page, tmp_path, f"ranking-{size}-{scheme}")
                for number, box in enumerate(page.locator(".places").all()):
                    box.locator("label").nth(number % 3).click()
                shot(page, tmp_path, f"ranked-{size}-{scheme}")
            else:
                page.locator(".choice label").first.click()
                page.locator(".strength label").nth(1).click()
                shot(page, tmp_path, f"chosen-{size}-{scheme}")
            assert serious(page) == []
            submit_by(page, page.get_by_role("button", name="Submit").click)
        shot(page, tmp_path, f"done-{size}-{scheme}")
        assert serious(page) == []
        if size == "desk":
            page.goto(f"{site.url}/previous")
            keys(page, "?")
            shot(page, tmp_path, f"help-{size}-{scheme}")
            assert serious(page) == []
        page.goto(f"{site.url}/admin")
        page.get_by_label("Name").fill("Bashir")
        page.get_by_role("button", name="Make a link").click()
        shot(page, tmp_path, f"admin-{size}-{scheme}")
        assert serious(page) == []
        page.get_by_role("button", name="Sign out").click()
        shot(page, tmp_path, f"out-{size}-{scheme}")
        assert serious(page) == []

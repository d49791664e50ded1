"""The labeling page over real HTTP: answers, refusals, hostile texts, crowds, and a server that is killed."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from configs.labels import PeopleConfig
from protocol.errors import UserError
from reward_service.labeling.guard import Limits, Rate
from reward_service.labeling.people import invite
from reward_service.labeling.server import Address, serve
from reward_service.preferences.store import PreferenceStore
from tests.integration.labeling_site import SECRETS, Labeler, Page, running_site, task
from tests.postgres_server import new_database, postgres_server

HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "template": "{{ 7 * 7 }}{% raw %}</textarea></div></section></form>",
    "markdown": "![look](https://evil.example/pixel.png) [click](javascript:alert(3))",
    "entity": "&lt;b&gt; &amp; &#60;script&#62;",
}


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_a_pair_is_answered_and_the_label_says_all_that_was_said(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)], ask_ratings=True, flags=["untrue", "rude"]) as site:
        ana = site.join()
        page = ana.look()
        assert page.texts[0] == "Question number 1?"
        reply = ana.answer(
            page, choice="2", strength="3", rating_1="2", rating_2="6", flag_1=["rude", "untrue"], note=" so\r\nso\0 "
        )
        assert (reply.status_code, reply.headers["location"]) == (303, "/")
        [label] = site.store.labels()
        shown = {"First answer to 1.": "c1-0", "Second answer to 1.": "c1-1"}
        assert label.presented == (shown[page.texts[1]], shown[page.texts[2]])
        assert label.outcome.winner == label.presented[1]
        assert label.outcome.strength == 3
        assert label.ratings == {label.presented[0]: 2, label.presented[1]: 6}
        assert label.flags == {label.presented[0]: ("untrue", "rude")}
        assert label.note == "so\nso\N{REPLACEMENT CHARACTER}"
        assert label.labeler_kind == "person"
        assert "Ana" not in label.labeler_id
        assert label.ui_version
        assert label.guideline_version
        assert 0 < label.shown_at <= label.submitted_at


@pytest.mark.parametrize(
    ("fields", "verdict", "reason"),
    [
        ({"choice": "tie", "strength": "2"}, "tie", None),
        ({"choice": "both_bad"}, "both_bad", None),
        ({"action": "skip", "reason": "language"}, "skip", "language"),
    ],
)
def test_other_verdicts_are_kept_apart(
    tmp_path: Path, fields: dict[str, str], verdict: str, reason: str | None
) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        ana = site.join()
        assert ana.answer(ana.look(), **fields).status_code == 303
        [label] = site.store.labels()
        assert (label.outcome.verdict, label.outcome.reason, label.outcome.strength) == (verdict, reason, None)


def test_a_ranking_takes_places_with_ties(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1, "a", "b", "c", "d"), task(2, "e", "f", "g")]) as site:
        ana = site.join()
        ana.answer(ana.look(), choice="ranking", place_1="4", place_2="1", place_3="4", place_4="2")
        [label] = site.store.labels()
        one, two, three, four = label.presented
        assert label.outcome.ranking == ((two,), (four,), (one, three))
        page = ana.look()
        assert ana.answer(page, choice="ranking", place_1="1", place_2="1").status_code == 422
        ana.answer(page, choice="ranking", place_1="2", place_2="2", place_3="2")
        assert site.store.labels()[1].outcome.verdict == "tie"


def test_undo_corrects_the_last_answer_and_keeps_the_first(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        ana = site.join()
        ana.answer(ana.look(), choice="1", strength="2", note="hm")
        page = ana.look("/previous")
        assert "You are changing your last answer" in page.html
        assert '<input type="radio" name="choice" value="1" checked>' in page.html
        assert ana.answer(page, choice="tie").status_code == 303
        assert ana.answer(page, choice="tie").status_code == 303
        first, second = site.store.labels(standing_only=False)
        assert second.supersedes == first.label_id
        assert [label.outcome.verdict for label in site.store.labels()] == ["tie"]
        assert ana.look().texts[0] == "Question number 2?"


def test_a_repeated_submit_is_one_label(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        ana = site.join()
        page = ana.look()
        replies: list[int] = []
        clicks = [
            threading.Thread(target=lambda: replies.append(ana.answer(page, json=True, choice="1").status_code))
            for _ in range(8)
        ]
        for click in clicks:
            click.start()
        for click in clicks:
            click.join()
        assert replies == [200] * 8
        ana.answer(ana.look(), choice="2")
        # The acknowledgement of the first was lost, and its page tries again after the second.
        assert ana.answer(page, json=True, choice="1").status_code == 200
        assert ana.answer(page, json=True, choice="2").status_code == 409
        assert len(site.store.labels(standing_only=False)) == 2


def test_attention_checks_come_at_their_turn_and_look_like_any_task(tmp_path: Path) -> None:
    tasks = [task(n) for n in range(5)] + [task(n, purpose="check", overlap=9) for n in range(10, 13)]
    with running_site(tmp_path, tasks, check_period=2) as site:
        ana = site.join()
        pages: list[Page] = []
        while "ticket" in (page := ana.look()).hidden:
            pages.append(page)
            ana.answer(page, choice="1")
        asked = [int(re.findall(r"\d+", page.texts[0])[0]) for page in pages]
        assert asked == [0, 1, 10, 2, 3, 11, 4]
        # Apart from texts, tickets and figures, a check's page is a task's page.
        plain = [re.sub(r"<dl>.*?</dl>|<span>.*? done.*?</header>", "", page.html, flags=re.DOTALL) for page in pages]
        blank = {re.sub(r"[0-9a-f]{24,}|\d+|First|Second", "", html) for html in plain}
        assert len(blank) == 1
        admin = site.join("Bo", admin=True)
        passed = sum(
            label.outcome.winner == f"c{number}-0"
            for label, number in zip(site.store.labels(purpose="check"), (10, 11), strict=True)
        )
        assert f'<td class="number">{passed} of 2</td>' in admin.look("/admin").html


def test_the_admin_sees_figures_invites_and_ends_access(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(n, overlap=2) for n in range(4)]) as site:
        people = [site.join("Ana"), site.join("<b>Bob</b>")]
        for labeler in people:
            for _ in range(4):
                page = labeler.look()
                labeler.answer(page, choice=str(1 + page.texts[1:].index(f"First answer to {page.texts[0][16]}.")))
        admin = site.join("Root", admin=True)
        page = admin.look("/admin")
        assert "<dt>Agreement</dt><dd>100%<small>on 4 shared pairs</small>" in page.html
        assert "&lt;b&gt;Bob&lt;/b&gt;" in page.html
        csrf = page.hidden["csrf"]
        again = admin.http.post("/admin/invite", data={"csrf": csrf, "name": " ana", "role": "admin"}).text
        assert "Ana had been invited before, as a labeler, and stays the same person" in again
        assert people[0].look().status == 401
        people[0].http.get(re.findall(rf"{site.url}/join/[\w-]+", again)[0])
        assert people[0].look("/admin").status == 403, "a renewed link gives no other role"
        assert [labeler.display_name for labeler in site.store.labelers()] == ["Ana", "<b>Bob</b>", "Root"]
        invited = admin.http.post("/admin/invite", data={"csrf": csrf, "name": "Cem", "role": "labeler"})
        [link] = re.findall(rf"{site.url}/join/[\w-]+", invited.text)
        assert "/join/" not in admin.look("/admin").html
        cem = Labeler(site.url)
        assert cem.http.get(link).status_code == 303
        assert cem.look().status == 200
        whom = site.store.labelers()[-1].labeler_id
        assert admin.http.post("/admin/disable", data={"csrf": csrf, "labeler_id": whom}).status_code == 303
        assert cem.look().status == 401
        assert Labeler(site.url).http.get(link).status_code == 401
        for path in ("/admin/invite", "/admin/disable"):
            mine = {"csrf": people[0].look("/previous").hidden["csrf"], "name": "Eve", "labeler_id": whom}
            assert people[0].http.post(path, data=mine).status_code == 403
        assert people[0].look("/admin").status == 403
        events = [entry.event for entry in site.store.audit_entries()]
        assert events[-4:] == ["invited", "joined", "disabled", "join_refused"]


# --- Nothing is told, nothing is believed ----------------------------------------------------------------------------


def test_nothing_tells_who_wrote_what(tmp_path: Path) -> None:
    tasks = [task(1), task(2, "a", "b", "c"), task(3, purpose="evaluation"), task(4, purpose="check")]
    with running_site(tmp_path, tasks, check_period=3) as site:
        ana = site.join()
        for number in (1, 2, 3, 4):
            page = ana.look()
            reply = ana.answer(page, json=True, choice="tie")
            seen = [page.html, str(page.response.headers), reply.text, str(reply.headers), ana.look("/previous").html]
            assert page.texts[0] == f"Question number {number}?"
            told = re.sub(r"\w+(-\w+)*-policy", "", " ".join(seen).lower())
            for word in (*SECRETS, f"c{number}-0", f"c{number}-1", f"prompt-{number}", "task-"):
                assert word not in told


def test_sides_are_shuffled_over_tasks(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(n) for n in range(40)]) as site:
        ana = site.join()
        first = 0
        for _ in range(40):
            page = ana.look()
            first += page.texts[1].startswith("First")
            ana.answer(page, choice="tie")
        assert 10 <= first <= 30  # outside in 1 of 1,000 seeds


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    with running_site(tmp_path, [task(1, HOSTILE[name], "harmless", prompt=HOSTILE[name])]) as site:
        page = site.join().look()
        assert sorted(page.texts) == sorted([HOSTILE[name], HOSTILE[name], "harmless"])
        assert "<script>" not in page.html
        assert "<img src=x" not in page.html
        assert page.html.count("<form") == 3


def test_characters_with_power_are_shown_as_signs(tmp_path: Path) -> None:
    text = "a\u202eb\u2066c\0d\x1be\ud800f\r\ng\rh\u2028i\ufeffj\u200fk"
    with running_site(tmp_path, [task(1, text, "harmless")]) as site:
        page = site.join().look()
        assert "a⟨U+202E⟩b⟨U+2066⟩c␀d␛e\N{REPLACEMENT CHARACTER}f\ng␍h⟨U+2028⟩i⟨U+FEFF⟩j\u200fk" in page.texts
        assert not set("\u202e\u2066\0\x1b\u2028") & set(page.html)


def test_a_megabyte_is_shown_whole(tmp_path: Path) -> None:
    text = "word <b>& \n" * 100_000
    with running_site(tmp_path, [task(1, text, "x" * 1_000_000)]) as site:
        ana = site.join()
        page = ana.look()
        assert sorted(page.texts, key=len)[1:] == ["x" * 1_000_000, text]
        assert ana.answer(page, choice="1").status_code == 303


def test_a_conversation_and_other_scripts_are_shown_as_they_are(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "مرحبا\n\tx  y"}]
    with running_site(tmp_path, [task(1, "```py\n  x = 1\n```\nfin", "日本語", prompt=prompt)]) as site:
        page = site.join().look()
        assert page.texts[0] == "Be kind.مرحبا\n\tx  y"
        assert {"```py\n  x = 1\n```\nfin", "日本語"} <= set(page.texts)
        assert '<div class="block code" dir="ltr">```py\n  x = 1\n```\n</div>' in page.html


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_every_answer_carries_the_security_headers(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        ana = site.join()
        join = httpx.get(site.invite("Bo"))
        cookie = join.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert join.headers["location"] == "/"
        for reply in (join, ana.look().response, httpx.get(site.url), httpx.get(site.url, headers={"host": "evil"})):
            policy = reply.headers["content-security-policy"]
            for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"):
                assert part in policy
            assert "form-action 'self'; base-uri 'none'" in policy
            assert "unsafe" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            assert reply.headers["cache-control"] == "no-store"
            assert "server" not in reply.headers
        html = ana.look().html
        assert not re.search(r"<script(?! src=)|<style|style=|\son\w+=|javascript:", html)


def test_nobody_comes_in_uninvited(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        reply = httpx.get(site.url)
        assert reply.status_code == 401
        assert "invite link" in reply.text
        told = httpx.post(f"{site.url}/labels", data={"csrf": "x"}, headers={"accept": "application/json"})
        assert (told.status_code, told.json()["keep"]) == (401, True)
        assert httpx.get(f"{site.url}/join/{'x' * 32}").status_code == 401
        for path in ("/register", "/signup", "/docs", "/openapi.json", "/static/../app.py", "/static/%2e%2e/app.py"):
            assert httpx.get(site.url + path).status_code == 404
        ana = site.join()
        cookie = ana.http.cookies["rondo_session"]
        ana.http.cookies.set("rondo_session", cookie.replace("p-", "q-", 1), domain="127.0.0.1")
        assert httpx.get(site.url, headers={"cookie": f"rondo_session={cookie}"}).status_code == 200
        assert httpx.get(site.url, headers={"cookie": f"rondo_session={cookie[:-1]}"}).status_code == 401
        assert (
            httpx.get(site.url, headers={"cookie": "rondo_session=\xff.1.2.3.4".encode("latin-1")}).status_code == 401
        )


def test_tokens_are_hashed_at_rest_and_the_secret_is_private(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        token = site.invite().rsplit("/", 1)[1]
        assert len(token) >= 32
        assert Labeler(site.url).http.get(f"/join/{token}").status_code == 303
    for path in tmp_path.iterdir():
        assert token.encode() not in path.read_bytes()
    assert stat.S_IMODE((tmp_path / "labeling.secret").stat().st_mode) == 0o600


def test_forms_of_other_sessions_and_sites_are_refused(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1), task(2)]) as site:
        ana, bob = site.join("Ana"), site.join("Bob")
        mine, theirs = ana.look(), bob.look()
        fields = {"choice": "1"}
        assert ana.http.post("/labels", data={"ticket": mine.hidden["ticket"]} | fields).status_code == 403
        replayed = mine.hidden | {"csrf": theirs.hidden["csrf"]} | fields
        assert ana.http.post("/labels", data=replayed).status_code == 403
        assert ana.http.post("/labels", data=replayed | {"csrf": "é"}).status_code == 403
        other_task = mine.hidden | {"ticket": theirs.hidden["ticket"]} | fields
        assert ana.http.post("/labels", data=other_task).status_code == 403
        for strange in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
            assert ana.http.post("/labels", data=mine.hidden | fields, headers=strange).status_code == 403
        again = Labeler(site.url)
        again.http.get(site.invite("Ana again"))
        assert again.http.post("/labels", data=mine.hidden | fields).status_code == 403
        assert site.store.labels() == []
        assert {"form_refused", "task_refused"} <= {entry.event for entry in site.store.audit_entries()}
        assert ana.http.get("/labels").status_code == 405
        assert ana.answer(mine, choice="1").status_code == 303


def test_a_session_that_ended_stays_ended(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        ana = site.join()
        cookie = {"cookie": f"rondo_session={ana.http.cookies['rondo_session']}"}
        csrf = ana.look().hidden["csrf"]
        assert ana.http.post("/leave", data={"csrf": "wrong"}).status_code == 403
        assert ana.http.post("/leave", data={"csrf": csrf}).status_code == 200
        assert httpx.get(site.url, headers=cookie).status_code == 401
    with running_site(tmp_path, []) as site:
        assert httpx.get(site.url, headers=cookie).status_code == 401


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"choice": "3"},
        {"choice": "1", "strength": "4"},
        {"choice": "1", "strength": "x"},
        {"choice": "1", "rating_1": "8"},
        {"choice": "1", "rating_1": "4"},
        {"choice": "1", "rating_3": "4"},
        {"choice": "1", "flag_1": "made up"},
        {"choice": "1", "flag_7": "untrue"},
        {"choice": ["1", "2"]},
        {"choice": "1", "surprise": "x"},
        {"action": "skip"},
        {"action": "skip", "reason": "made up"},
        {"choice": "1", "note": "x" * 4001},
    ],
)
def test_forms_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        ana = site.join()
        page = ana.look()
        told = ana.answer(page, json=True, **fields)
        assert (told.status_code, told.json()["keep"]) == (422, False)
        assert ana.answer(page, **fields).status_code == 422
        assert (
            ana.http.post(
                "/labels", content=b"\xff\xfe=%ff", headers={"content-type": "application/x-www-form-urlencoded"}
            ).status_code
            == 422
        )
        assert ana.http.post("/labels", json={"choice": "1"}).status_code == 415
        assert site.store.labels() == []


def test_an_incomplete_form_comes_back_as_it_was_filled_in(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)], ask_ratings=True) as site:
        ana = site.join()
        again = Page(ana.answer(ana.look(), choice="2", rating_1="3", note="half done"))
        assert again.status == 422
        assert "Rate every response" in again.html
        assert '<input type="radio" name="choice" value="2" checked>' in again.html
        assert '<input type="radio" name="rating-1" value="3" checked>' in again.html
        assert ">half done</textarea>" in again.html


def test_a_lease_that_is_over_is_refused_in_plain_words(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1)], lease_s=0.5) as site:
        ana, bob = site.join("Ana"), site.join("Bob")
        page = ana.look()
        assert "ticket" not in bob.look().hidden
        time.sleep(0.6)
        assert bob.look().texts[0] == "Question number 1?"
        told = ana.answer(page, json=True, choice="1")
        assert (told.status_code, told.json()["keep"]) == (409, False)
        assert "time for this task is over" in told.json()["message"]
        assert bob.answer(bob.look(), choice="1").status_code == 303


def test_answers_before_a_task_can_be_read_wait(tmp_path: Path) -> None:
    with running_site(tmp_path, [task(1), task(2)], min_read_s=1.2) as site:
        ana = site.join()
        page = ana.look()
        told = ana.answer(page, json=True, choice="1")
        assert (told.status_code, told.json()["keep"]) == (429, True)
        time.sleep(int(told.headers["retry-after"]))
        assert ana.answer(page, json=True, choice="1").status_code == 200
        assert ana.answer(ana.look(), json=True, action="skip", reason="unclear").status_code == 200


def test_too_large_and_too_many_are_refused(tmp_path: Path) -> None:
    limits = Limits(
        body_bytes=2000,
        labeler=Rate(per_s=0.01, burst=5),
        address=Rate(per_s=0.01, burst=30),
        join=Rate(per_s=0.01, burst=9),
    )
    with running_site(tmp_path, [task(1)], limits=limits) as site:
        ana = site.join()
        page = ana.look()
        assert ana.answer(page, choice="1", note="x" * 3000).status_code == 413
        chunks = (b"note=" + b"x" * 500 for _ in range(10))
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert ana.http.post("/labels", content=chunks, headers=form).status_code == 413
        replies = [ana.look().response for _ in range(4)]
        assert [reply.status_code for reply in replies] == [200, 200, 429, 429]
        assert 90 <= int(replies[-1].headers["retry-after"]) <= 100
        codes = [httpx.get(f"{site.url}/join/wrong").status_code for _ in range(10)]
        assert Counter(codes) == {401: 8, 429: 2}
        codes = [httpx.get(site.url).status_code for _ in range(30)]
        assert codes[-1] == 429


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.5:80", "[::1", ""])
def test_other_names_are_not_answered(tmp_path: Path, host: str) -> None:
    with running_site(tmp_path, [task(1)]) as site:
        assert httpx.get(site.url, headers={"host": host}).status_code == 400
        assert httpx.get(site.url, headers={"host": "localhost:99"}).status_code == 401


def test_a_link_from_elsewhere_lands_on_the_page(tmp_path: Path) -> None:
    """A browser that follows a link from a mail sends no strict cookie along on the first request."""
    with running_site(tmp_path, [task(1)]) as site:
        reply = httpx.get(site.url, headers={"sec-fetch-site": "cross-site"})
        assert '<meta http-equiv="refresh" content="0; url=/">' in reply.text
        assert "refresh" not in httpx.get(site.url, headers={"sec-fetch-site": "same-origin"}).text


# --- The server ------------------------------------------------------------------------------------------------------


def test_a_public_address_needs_leave_and_the_way_out_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'p.db'}"
    with pytest.raises(UserError, match="proxy that speaks TLS"):
        serve(url, config=PeopleConfig(), run_name="demo", address=Address(host="0.0.0.0", port=0))
    with pytest.raises(UserError, match="no-such-file"):
        serve(url, config=PeopleConfig(guidelines="no-such-file"), run_name="demo", address=Address(port=0))


def test_ctrl_c_closes_the_page_cleanly(tmp_path: Path) -> None:
    store_url = f"sqlite:///{tmp_path / 'preferences.db'}"
    with served(store_url, tmp_path) as (server, url):
        assert httpx.get(url).status_code == 401
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=20)
        assert server.returncode == 0
        assert "Traceback" not in output
    with served(store_url, tmp_path) as (_, taken), pytest.raises(UserError, match="another port"):
        serve("sqlite://", config=PeopleConfig(), run_name="demo", address=Address(port=int(taken.rsplit(":", 1)[1])))


SERVE = """
import sys
from pathlib import Path
from configs.labels import PeopleConfig
from reward_service.labeling.server import Address, serve
serve(
    sys.argv[1],
    config=PeopleConfig(),
    run_name="demo",
    address=Address(port=int(sys.argv[2])),
    secret_path=Path(sys.argv[3]),
)
"""


@contextmanager
def served(store_url: str, folder: Path, *, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the server in a process of its own; its secret is kept in the folder."""
    command = [sys.executable, "-c", SERVE, store_url, str(port), str(folder / "labeling.secret")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            while not (found := re.search(r"http://\S+", line := server.stdout.readline())):
                assert line, "the server ended"
            yield server, found[0]
        finally:
            server.kill()


def patient(send: Callable[[], httpx.Response], *, until: float) -> httpx.Response:
    """Send until there is an answer other than "too many requests"."""
    while True:
        reply = send()
        if reply.status_code != 429 or time.monotonic() > until:
            return reply
        time.sleep(float(reply.headers["retry-after"]))


def work(url: str, link: str, acknowledged: list[str], *, until: float) -> None:
    """Label like a person with the page's script: what was not acknowledged is sent again, over restarts."""
    labeler = Labeler(url)
    pending: Page | None = None
    joined = False
    while time.monotonic() < until:
        try:
            if not joined:
                joined = patient(lambda: labeler.http.get(link), until=until).status_code == 303
            if pending is None:
                page = Page(patient(lambda: labeler.http.get("/"), until=until))
                if "ticket" not in page.hidden:
                    return
                pending = page
            reply = patient(partial(labeler.answer, pending, json=True, choice="1"), until=until)
        except httpx.TransportError:
            time.sleep(0.05)
            continue
        if reply.status_code == 200:
            acknowledged.append(pending.hidden["ticket"].split(".")[0])
        assert reply.status_code == 200, reply.text
        pending = None


def in_threads(url: str, links: list[str], *, seconds: float) -> tuple[list[threading.Thread], list[str]]:
    acknowledged: list[str] = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=work, args=(url, link, acknowledged), kwargs={"until": until}) for link in links]
    for thread in threads:
        thread.start()
    return threads, acknowledged


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'preferences.db'}"
        return
    with postgres_server() as folder:
        yield new_database(folder)


def test_no_acknowledged_label_is_lost_when_the_server_is_killed(store_url: str, tmp_path: Path) -> None:
    store = PreferenceStore.open(store_url)
    store.add_tasks([task(n) for n in range(120)])
    links = [invite(store, f"L{n}", base_url="").url for n in range(6)]
    with served(store_url, tmp_path) as (server, url):
        port = int(url.rsplit(":", 1)[1])
        threads, acknowledged = in_threads(url, links, seconds=120)
        _wait_for(lambda: len(acknowledged) >= 15)
        os.kill(server.pid, signal.SIGKILL)
    for round in range(2, 6):
        with served(store_url, tmp_path, port=port) as (server, _):
            wanted = 15 * round
            _wait_for(lambda: len(acknowledged) >= wanted)  # noqa: B023
            os.kill(server.pid, signal.SIGKILL)
    with served(store_url, tmp_path, port=port):
        for thread in threads:
            thread.join(timeout=120)
    labels = store.labels(standing_only=False)
    assert len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= {label.label_id for label in labels}
    assert sorted(label.task_id for label in labels) == sorted(f"task-{n}" for n in range(120))
    for label in labels:
        label.check_against(store.task(label.task_id))
    store.close()


def _wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_fifty_labelers_at_once_label_no_task_too_often(
    store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = PreferenceStore.open(store_url)
    store.add_tasks([task(n, overlap=2) for n in range(1000)])
    links = [invite(store, f"L{n}", base_url="").url for n in range(50)]
    with served(store_url, tmp_path) as (_, url):
        started = time.monotonic()
        threads, acknowledged = in_threads(url, links, seconds=240)
        for thread in threads:
            thread.join()
        with capsys.disabled():
            print(f"2,000 submits by 50 labelers in {time.monotonic() - started:.1f} s")
    labels = store.labels(standing_only=False)
    assert sorted(acknowledged) == sorted(label.label_id for label in labels)
    assert set(Counter(label.task_id for label in labels).values()) == {2}
    assert len({(label.task_id, label.labeler_id) for label in labels}) == len(labels) == 2000
    store.close()

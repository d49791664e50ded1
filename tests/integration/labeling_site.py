"""A labeling page on a free port of this machine, with tasks and people, and a client that works like a browser."""

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from configs.data import SourceConfig
from configs.labels import PeopleConfig
from reward_service.labeling.app import make_app
from reward_service.labeling.guard import Limits, Rate
from reward_service.labeling.people import invite
from reward_service.labeling.security import SecretFile
from reward_service.labeling.server import settings, site_at
from reward_service.preferences.records import Candidate, Purpose, Task
from reward_service.preferences.store import PreferenceStore

GENEROUS = Limits(
    labeler=Rate(per_s=1e4, burst=10_000), address=Rate(per_s=1e5, burst=100_000), join=Rate(per_s=1e4, burst=10_000)
)
SECRETS = ("v017", "v003", "gold-rm", "0.8125", "temperature", "policy", "expected", "evaluation", "check-task")
"""Words that tasks below hold and that no labeler may be told."""


def task(
    number: int, *texts: str, prompt: Any = None, purpose: Purpose = "training", overlap: int = 1, round: int = 1
) -> Task:
    """Make a pair, or with more than two texts a ranking, whose every secret is a word of `SECRETS`."""
    texts = texts or (f"First answer to {number}.", f"Second answer to {number}.")
    candidates = tuple(
        Candidate(
            candidate_id=f"c{number}-{place}",
            text=text,
            policy="v017" if place == 0 else "v003",
            policy_version=17 if place == 0 else 3,
            sampling={"temperature": 0.8125},
            scores={"gold-rm": 0.8125},
        )
        for place, text in enumerate(texts)
    )
    return Task(
        task_id=f"{'check-task' if purpose == 'check' else 'task'}-{number}",
        round=round,
        kind="pair" if len(texts) == 2 else "ranking",
        purpose=purpose,
        prompt_id=f"prompt-{number}",
        prompt=prompt or f"Question number {number}?",
        candidates=candidates,
        expected=candidates[0].candidate_id if purpose == "check" else None,
        overlap=overlap,
        metadata={"source": "policy v017"},
    )


@dataclass(kw_only=True)
class RunningSite:
    """A page that is being served."""

    url: str
    store: PreferenceStore
    links: list[str] = field(default_factory=list)

    def invite(self, name: str = "Ana", *, admin: bool = False) -> str:
        """Return an invite link."""
        return invite(self.store, name, role="admin" if admin else "labeler", base_url=self.url).url

    def join(self, name: str = "Ana", *, admin: bool = False) -> "Labeler":
        """Return somebody who came in by a link."""
        labeler = Labeler(self.url)
        assert labeler.http.get(self.invite(name, admin=admin)).status_code == 303
        return labeler


class Labeler:
    """Somebody who reads the page's HTML and sends its form, as a browser without script does."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)

    def look(self, path: str = "/") -> "Page":
        """Load a page."""
        return Page(self.http.get(path))

    def answer(self, page: "Page", *, json: bool = False, **fields: str | Sequence[str]) -> httpx.Response:
        """Send the form of a page; `rating_1` stands for the field `rating-1`."""
        named = {re.sub(r"_(\d)$", r"-\1", name): value for name, value in fields.items()}
        headers = {"accept": "application/json"} if json else {}
        return self.http.post("/labels", data=page.hidden | named, headers=headers)


class Page:
    """What the server sent."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.status = response.status_code
        self.html = response.text
        self.hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', self.html))

    @property
    def texts(self) -> list[str]:
        """The texts of prompt and responses, as they are shown."""
        boxes = re.findall(r'<div class="text".*?</div>\s*(?=</section>|<div class="judge">)', self.html, re.DOTALL)
        blocks = [re.findall(r'<div class="block[^>]*>(.*?)</div>', box, re.DOTALL) for box in boxes]
        return [unescape("".join(found)) for found in blocks]


@contextmanager
def running_site(
    folder: Path, tasks: Sequence[Task], *, limits: Limits = GENEROUS, **config: Any
) -> Iterator[RunningSite]:
    """Serve a page from a thread of this process."""
    store = PreferenceStore.open(f"sqlite:///{folder / 'preferences.db'}")
    store.add_tasks(tasks)
    secret_file = SecretFile(folder / "labeling.secret")
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        site = replace(site_at(url, host="127.0.0.1", run_name="demo"), limits=limits)
        if "check_period" in config:  # the tests put their checks into the store themselves
            config.setdefault("checks", SourceConfig(source="examples.quickstart.data:preferences", count=1))
        app = make_app(store, config=PeopleConfig(**config), site=site, secret_file=secret_file)
        server = uvicorn.Server(settings(app, behind_proxy=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield RunningSite(url=url, store=store)
        finally:
            server.should_exit = True
            thread.join()
            store.close()

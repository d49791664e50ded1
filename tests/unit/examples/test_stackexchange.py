"""Rankings from votes: the published score, shared ranks, and what is left out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from examples.stackexchange.data import ranking, score
from protocol.records import RankingRecord, normalize


def test_v23_scores(vectors: dict[str, Any]) -> None:
    for upvotes, accepted, expected in vectors["V23_stackexchange"]["cases"]:
        assert score(upvotes=upvotes, accepted=accepted) == expected


def answer(text: str, upvotes: int, *, accepted: bool = False) -> dict[str, Any]:
    return {"text": text, "upvotes": upvotes, "accepted": accepted}


def test_equal_scores_share_a_rank_and_the_best_comes_first() -> None:
    found = ranking("q", [answer("a", 0), answer("b", 20), answer("c", 16), answer("d", -2)])
    assert found == {"prompt": "q", "completions": ["b", "c", "a", "d"], "ranks": [1, 1, 2, 3]}


def test_what_ranks_nothing_is_none() -> None:
    assert ranking("q", [answer("a", 3)]) is None
    assert ranking("q", [answer("a", 3), answer("b", 3)]) is None


def test_the_command_writes_what_the_reward_model_reads(tmp_path: Path) -> None:
    posts = [
        {"question": "how?", "answers": [answer("so", 7, accepted=True), answer("thus", 1)]},
        {"question": "why?", "answers": []},
    ]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    command = [sys.executable, "-m", "examples.stackexchange.data", tmp_path / "posts.jsonl", tmp_path / "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1 rankings; 1 questions left out, which rank nothing\n"
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert isinstance(normalize(row), RankingRecord)
    assert row == {"prompt": "how?", "completions": ["so", "thus"], "ranks": [1, 2]}

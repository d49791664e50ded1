"""Make rankings for a reward model from questions and answers with votes.

    python -m examples.stackexchange.data posts.jsonl rankings.jsonl

Every line of the input is a question: {"question": str, "answers": [{"text": str, "upvotes": int, "accepted": bool}]}.
Every line of the output is a ranking that `rondo data inspect` and `data.preferences` read. A question with fewer than
two answers, or whose answers all have one score, ranks nothing; how many were left out is printed.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_ANSWERS = 9
"""More completions than this are more than a ranking may have; the best-voted ones are kept."""


def score(*, upvotes: int, accepted: bool) -> int:
    """Score an answer by its votes.

        round(log2(1 + upvotes)) + 1 if accepted;  -1 if the votes are negative

    Source: Askell et al., "A General Language Assistant as a Laboratory for Alignment" (2021), section 4.1.

    Args:
        upvotes: Votes for minus votes against.
        accepted: Whether who asked chose it.

    Returns:
        The score; higher is better.
    """
    if upvotes < 0:
        return -1
    return round(math.log2(1 + upvotes)) + int(accepted)


def ranking(question: str, answers: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rank a question's answers by their scores; equal scores share a rank.

    Args:
        question: The prompt.
        answers: Each with `text`, `upvotes` and `accepted`.

    Returns:
        A row of prompt, completions and ranks (1 is best), or None if nothing is ranked.
    """
    scored = [(score(upvotes=a["upvotes"], accepted=a["accepted"]), a["text"]) for a in answers]
    scored.sort(key=lambda pair: -pair[0])  # stable: answers of one score stay in their order
    scored = scored[:MAX_ANSWERS]
    levels = sorted({value for value, _ in scored}, reverse=True)
    if len(levels) < 2:
        return None
    return {
        "prompt": question,
        "completions": [text for _, text in scored],
        "ranks": [levels.index(value) + 1 for value, _ in scored],
    }


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posts", type=Path, help="questions with answers, one JSON object a line")
    parser.add_argument("rankings", type=Path, help="where the rankings go")
    options = parser.parse_args()
    if not options.posts.exists():
        sys.exit(f"{options.posts} does not exist")
    written = left_out = 0
    with options.posts.open(encoding="utf-8") as posts, options.rankings.open("w", encoding="utf-8") as rankings:
        for line in posts:
            post = json.loads(line)
            row = ranking(post["question"], post["answers"])
            if row is None:
                left_out += 1
                continue
            rankings.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print(f"{written} rankings; {left_out} questions left out, which rank nothing")


if __name__ == "__main__":
    main()

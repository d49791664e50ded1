"""Tasks and ways to answer them, for the tests of labelers."""

import re
from collections.abc import Callable, Sequence

from protocol.records import Text
from protocol.tokens import Message
from reward_service.preferences.completion import CompletionFailure
from reward_service.preferences.records import Candidate, Task

Reply = Callable[[str, str], str | CompletionFailure]
"""What a judge says about the response it is shown first and the one it is shown second."""

_SHOWN = re.compile(r"=== ANSWER ([AB]) (\w+) ===\n(.*)\n=== END OF ANSWER \1 \2 ===", re.DOTALL)


def task(name: str, *texts: str, prompt: Text = "Say something.") -> Task:
    """Make a pair or a ranking; its candidates are called c0, c1 and so on."""
    candidates = tuple(
        Candidate(candidate_id=f"c{place}", text=text, policy=f"secret-policy-{place}", policy_version=place)
        for place, text in enumerate(texts)
    )
    return Task(
        task_id=name,
        round=1,
        kind="pair" if len(texts) == 2 else "ranking",
        purpose="training",
        prompt_id=f"p-{name}",
        prompt=prompt,
        candidates=candidates,
        metadata={"topic": name},
    )


def number_of(text: str) -> float:
    """Read the worth of a response that ends in a number, such as `good 3.5`."""
    return float(text.split()[-1])


def gold(*, responses: list[str], **rest: object) -> list[float]:
    """Score responses by the number they end in."""
    return [number_of(response) for response in responses]


def score_texts(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
    """Score responses by the number they end in, as a reward model would be asked."""
    return [number_of(response) for response in responses]


def shown(question: str) -> tuple[str, str]:
    """Read the two responses out of the built-in question."""
    first, second = (found[3] for found in _SHOWN.finditer(question))
    return first, second


def honest(first: str, second: str) -> str:
    """Prefer the larger number."""
    difference = number_of(first) - number_of(second)
    return "I thought.\nVERDICT: " + ("TIE" if difference == 0 else "A" if difference > 0 else "B")


class ReplyingCompleter:
    """Answers in this process, by a rule, and keeps the questions."""

    def __init__(self, reply: Reply = honest) -> None:
        self.reply = reply
        self.questions: list[str] = []

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str | CompletionFailure]:
        """Answer each question."""
        texts = [messages[-1]["content"] for messages in prompts]
        self.questions += texts
        return [self.reply(*shown(text)) for text in texts]

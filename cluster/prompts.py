"""Turns prompt records into token ids, and hands them out in an order that survives interruptions."""

import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from protocol.datasets import ReadReport
from protocol.errors import UserError
from protocol.messages import Prompt
from protocol.records import PromptRecord, Text, text_of
from protocol.roles import RolloutPool
from protocol.tokens import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cluster.fixed_responses import FixedResponses


def encode_prompts(
    records: Iterable[PromptRecord],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    overlong: Literal["error", "drop"],
) -> tuple[list[Prompt], ReadReport]:
    """Encode prompts for the engine and name each one.

    A record without an id is named after its content, so that its name does not depend on its place; a prompt that
    comes again gets a number behind its name.

    Args:
        records: The prompts.
        tokenizer: The policy's tokenizer.
        max_tokens: The longest prompt allowed, chat template included.
        overlong: What to do with a longer one.

    Raises:
        UserError: A prompt is too long (unless dropped), has no tokens, shares its id with another, or none is left.
    """
    report = ReadReport(source="prompts")
    prompts: list[Prompt] = []
    names: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        where = f"prompt {number}" if record.record_id is None else f"prompt {number} (id {record.record_id})"
        try:
            token_ids = encode_prompt(tokenizer, record.prompt)
        except UserError as error:
            raise error.at(where) from error
        if len(token_ids) > max_tokens:
            if overlong == "error":
                raise _too_long(where, len(token_ids), max_tokens)
            report.drop(f"longer than rollout.max_prompt_tokens = {max_tokens}", where)
            continue
        if not token_ids:
            raise UserError("the prompt has no tokens", where=where)
        report.keep()
        prompts.append(
            Prompt(
                prompt_id=_unique_name(record, names, where),
                token_ids=np.asarray(token_ids, dtype=np.int32),
                text=text_of(record.prompt),
                metadata=dict(record.metadata),
                source=record.prompt,
            )
        )
    if not prompts:
        raise UserError(f"no prompt is left: {report.summary()}", next_step="raise rollout.max_prompt_tokens")
    return prompts, report


def content_name(content: Text | list[Text]) -> str:
    """Name something after what it says."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PromptStream:
    """Hands out prompts without end, each epoch in an order drawn from (seed, epoch).

    One `take` never holds a prompt twice, even where it ends one epoch and begins the next: the key of a response is
    made of its prompt's id, so two of them in one iteration would be the same response. Prompts that a take already
    holds wait until it is full and come next; every epoch stays a permutation.

    Args:
        prompts: What is handed out.
        seed: Of the orders.
        where: The configuration key that the prompts are from, for messages.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, where: str = "data.prompts") -> None:
        self.prompts = tuple(prompts)
        self.seed = seed
        self._where = where
        if not self.prompts:
            raise UserError("there are no prompts to stream")
        self._fingerprint = zlib.crc32("\n".join(prompt.prompt_id for prompt in self.prompts).encode())
        self._begin_epoch(0, leading=[])

    def take(self, num_prompts: int) -> list[Prompt]:
        """Return the next prompts, all different.

        Raises:
            UserError: More are asked for than there are.
        """
        if num_prompts > len(self.prompts):
            raise UserError(
                f"an iteration asks for {num_prompts} different prompts, but there are only {len(self.prompts)}",
                where="rollout.responses_per_iteration",
                next_step="lower it, raise rollout.samples_per_prompt, or give more prompts",
            )
        taken = self._order[self._position : self._position + num_prompts]
        self._position += len(taken)
        if len(taken) < num_prompts:
            taken += self._take_from_next_epoch(num_prompts - len(taken), already=set(taken))
        return [self.prompts[index] for index in taken]

    def state_dict(self) -> dict[str, int | list[int]]:
        """Return where the stream stands, as plain JSON."""
        return {
            "seed": self.seed,
            "num_prompts": len(self.prompts),
            "fingerprint": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "leading": list(self._leading),
        }

    def load_state_dict(self, state: dict[str, int | list[int]]) -> None:
        """Go on where another stream over the same prompts stood.

        Raises:
            UserError: The prompts or the seed are not the same.
        """
        mine = self.state_dict()
        changed = [name for name in ("seed", "num_prompts", "fingerprint") if state[name] != mine[name]]
        if changed:
            raise UserError(
                f"the prompts are not those of the checkpoint ({', '.join(changed)} changed)",
                where=self._where,
                next_step="resume with the same data and seed, or start a new run",
            )
        epoch, position, leading = state["epoch"], state["position"], state["leading"]
        assert isinstance(epoch, int)
        assert isinstance(position, int)
        assert isinstance(leading, list)
        self._begin_epoch(epoch, leading=leading)
        self._position = position

    def _take_from_next_epoch(self, num_missing: int, *, already: set[int]) -> list[int]:
        order = _shuffled(len(self.prompts), self.seed, self._epoch + 1)
        fresh, waiting = [], []
        for index in order:
            if len(fresh) == num_missing:
                break
            (waiting if index in already else fresh).append(index)
        self._begin_epoch(self._epoch + 1, leading=fresh + waiting)
        self._position = num_missing
        return fresh

    def _begin_epoch(self, epoch: int, *, leading: list[int]) -> None:
        first = set(leading)
        rest = [index for index in _shuffled(len(self.prompts), self.seed, epoch) if index not in first]
        self._epoch, self._leading, self._position = epoch, list(leading), 0
        self._order = [*leading, *rest]


def _shuffled(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _unique_name(record: PromptRecord, names: dict[str, int], where: str) -> str:
    name = content_name(record.prompt) if record.record_id is None else record.record_id
    names[name] = names.get(name, 0) + 1
    if names[name] == 1:
        return name
    if record.record_id is not None:
        raise UserError(f"the id {name!r} is used twice", where=where, next_step="give every prompt its own id")
    return f"{name}-{names[name]}"


def _too_long(where: str, num_tokens: int, max_tokens: int) -> UserError:
    return UserError(
        f"the prompt has {num_tokens} tokens, more than rollout.max_prompt_tokens = {max_tokens}",
        where=where,
        next_step="raise rollout.max_prompt_tokens, or set data.overlong_prompts=drop to leave such prompts out",
    )


class PromptSource(Protocol):
    """The prompts of a run, read when they are first needed: the tokenizer comes with the supervised policy."""

    def training(self) -> Sequence[Prompt]:
        """All training prompts."""
        ...

    def held_out(self) -> Sequence[Prompt]:
        """The prompts of evaluations."""
        ...

    def responses(self) -> "FixedResponses":
        """The fixed set of responses, where the run learns from one."""
        ...

    def answered(self, workers: RolloutPool, /) -> RolloutPool:
        """Say who answers the stream's prompts: the rollout workers, or a fixed set of responses."""
        ...

    def stream(self) -> PromptStream:
        """The stream that the iterations take from."""
        ...

    def rewind(self) -> None:
        """Have the stream begin again."""
        ...

    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        ...

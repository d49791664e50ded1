"""The comparisons that a reward model learns from: read from their sources, gathered by prompt, and split by prompt.

No prompt is ever on both sides of a split, whatever the round, and the two halves of the comparisons never meet.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.data import SourceConfig
from configs.run import RunConfig
from learner.batch import TokenSequence
from learner.supervised_loop import encode_pair
from protocol.datasets import ReadReport, read_preferences
from protocol.errors import UserError
from protocol.records import PreferenceRecord

BASE = "base"
"""The source that `data.preferences` is."""
Half = Literal["all", "train", "heldout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSource:
    """Comparisons of one origin, such as a round's."""

    name: str
    data: SourceConfig
    weight: float = 1.0
    """How much each of its prompts counts in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelJob:
    """One reward model to be trained."""

    policy: Path
    """The supervised policy: gives the tokenizer and, unless configured otherwise, the trunk."""
    output: Path
    """The directory that rank 0 writes, with reward_model_report.json in it; must not exist."""
    sources: tuple[ComparisonSource, ...]
    round: int = 1
    start: Path | None = None
    """A reward model to start from; what `models.reward.init` says if not given."""
    half: Half = "all"
    """Which of the prompts that are not held out it trains on: those of `train` and `heldout` have none in common."""
    heldout_share: float = 0.0
    """Share of the prompts that are for `heldout`."""
    incumbent: Path | None = None
    """An earlier reward model to be judged on the same held-out pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """One prompt's completions, and the pairs among them."""

    sequences: tuple[TokenSequence, ...]
    """[K] the prompt with each of its different completions."""
    better: tuple[int, ...]
    """[P] which completion each pair prefers."""
    worse: tuple[int, ...]
    """[P] to which."""
    margins: tuple[float, ...]
    """[P] by how much, in units of the score; 0 where nobody said."""
    source: str = BASE
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the completions take when they are stacked."""
        return len(self.sequences) * max(sequence.num_tokens for sequence in self.sequences)


def read_comparisons(
    config: RunConfig, tokenizer: Any, sources: Sequence[ComparisonSource], *, context_tokens: int | None
) -> tuple[list[Comparisons], ReadReport]:
    """Read comparisons, encode them, and gather those of each source by prompt.

    Args:
        config: The run's configuration.
        tokenizer: The policy's.
        sources: Where from; a source of weight 0 is left out.
        context_tokens: The longest sequence that the reward model takes; None for no limit.

    Returns:
        The comparisons of each prompt, in the order of first appearance, and what became of the rows.

    Raises:
        UserError: If fewer than two prompts are left.
    """
    reading = ReadReport(source=", ".join(source.data.source for source in sources))
    elements: list[Comparisons] = []
    for source in sources:
        if source.weight == 0:
            continue
        by_prompt: dict[bytes, list[_EncodedPair]] = {}
        records = read_preferences(
            source.data.source,
            split=source.data.split,
            seed=config.run.seed,
            count=source.data.count,
            report=reading,
        )
        for number, record in enumerate(records, start=1):
            pair = _encode(tokenizer, record)
            if context_tokens is not None and max(pair.better.num_tokens, pair.worse.num_tokens) > context_tokens:
                reading.drop(
                    f"longer than the model's context of {context_tokens} tokens", f"{source.name}, pair {number}"
                )
                reading.num_kept -= 1
                continue
            by_prompt.setdefault(pair.better.prompt_ids.tobytes(), []).append(pair)
        elements += [_comparisons(pairs, source) for pairs in by_prompt.values()]
    if len({element.sequences[0].prompt_ids.tobytes() for element in elements}) < 2:
        raise UserError(
            f"a reward model needs comparisons on at least two prompts, one to train on and one to hold out: "
            f"{reading.summary()}",
            where="data.preferences" if len(sources) == 1 and sources[0].name == BASE else "the rounds' comparisons",
        )
    return elements, reading


def split(
    elements: Sequence[Comparisons], job: RewardModelJob, *, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Choose the prompts to train on and those held out for validation.

    A prompt's side depends on the prompt and the seed alone. So a prompt that is held out in one round is held out in
    all, no reward model of the run has trained on what another is validated on, and the two halves never meet.

    Args:
        elements: The comparisons of each prompt.
        job: Which half.
        fraction: Share of the prompts to hold out for validation.
        seed: The run's.

    Returns:
        Indices of the elements to train on and of those held out, in order.

    Raises:
        UserError: If nothing is left to train on.
    """
    place = [_place(element.sequences[0].prompt_ids.tobytes(), seed, "held-out") for element in elements]
    bound = max(fraction, min(place))  # at least one prompt, however few there are
    heldout = [index for index, at in enumerate(place) if at <= bound]
    rest = [index for index, at in enumerate(place) if at > bound]
    if job.half != "all":
        for_heldout = {
            index
            for index in rest
            if _place(elements[index].sequences[0].prompt_ids.tobytes(), seed, "half") < job.heldout_share
        }
        rest = [index for index in rest if (index in for_heldout) == (job.half == "heldout")]
    if not rest:
        raise UserError(
            f"no comparisons are left to train the {job.half} reward model on; there are {len(elements)} prompts",
            next_step="give more comparisons, or set rounds.heldout_share=0",
        )
    return rest, heldout


def _place(prompt: bytes, seed: int, what: str) -> float:
    """Draw a number between 0 and 1 from a prompt."""
    digest = hashlib.sha256(f"{seed}/{what}/".encode() + prompt).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncodedPair:
    better: TokenSequence
    worse: TokenSequence
    margin: float


def _encode(tokenizer: Any, record: PreferenceRecord) -> _EncodedPair:
    return _EncodedPair(
        better=encode_pair(tokenizer, record.prompt, record.chosen),
        worse=encode_pair(tokenizer, record.prompt, record.rejected),
        margin=0.0 if record.margin is None else record.margin,
    )


def _comparisons(pairs: Sequence[_EncodedPair], source: ComparisonSource) -> Comparisons:
    """Gather one prompt's pairs; a completion that several of them share is kept once."""
    place: dict[bytes, int] = {}
    sequences: list[TokenSequence] = []
    sides: list[int] = []
    for sequence in (side for pair in pairs for side in (pair.better, pair.worse)):
        key = sequence.response_ids.tobytes()
        if key not in place:
            place[key] = len(sequences)
            sequences.append(sequence)
        sides.append(place[key])
    return Comparisons(
        sequences=tuple(sequences),
        better=tuple(sides[::2]),
        worse=tuple(sides[1::2]),
        margins=tuple(pair.margin for pair in pairs),
        source=source.name,
        weight=source.weight,
    )

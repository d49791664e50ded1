"""The comparisons that a reward model learns from: read from their sources, gathered by prompt, and split by prompt.

No prompt is ever on both sides of a split, whatever the round, and the two halves of the comparisons never meet. All
judgements of a prompt, whatever their sources, are one element of a batch: taken for independent examples, the pairs of
one prompt overfit.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from configs.data import SourceConfig
from configs.learner import MarginKind
from configs.run import RunConfig
from learner.batch import TokenSequence
from learner.supervised_loop import encode_pair
from protocol.datasets import ReadReport, read_judgements
from protocol.errors import UserError
from protocol.records import PreferenceRecord, RankingRecord

BASE = "base"
"""The source that `data.preferences` is."""
MAX_STRENGTH = 3.0
"""The strength of a label that says "much better"."""
Half = Literal["all", "train", "heldout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSource:
    """Comparisons of one origin, such as a round's."""

    name: str
    data: SourceConfig
    weight: float = 1.0
    """How much each of its judgements counts in the loss. A prompt counts by the mean of its pairs' weights
    (`plackett_luce`: its rankings')."""


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
class Ranking:
    """One judgement of some of a prompt's completions, two of them or more."""

    completions: tuple[int, ...]
    """[K] which."""
    ranks: tuple[int, ...]
    """[K] 1 is best, equal ranks are ties."""
    weight: float
    """Its source's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """One prompt's completions, and the judgements of them, as rankings and as the pairs that these order."""

    sequences: tuple[TokenSequence, ...]
    """[K] the prompt with each of its different completions."""
    better: tuple[int, ...]
    """[P] which completion each pair prefers."""
    worse: tuple[int, ...]
    """[P] to which."""
    margins: tuple[float, ...]
    """[P] by how much, in units of the score; 0 where nobody said."""
    sources: tuple[str, ...]
    """[P] where each pair is from."""
    weights: tuple[float, ...]
    """[P] its source's."""
    rankings: tuple[Ranking, ...]
    """A pair is a ranking of two."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the completions take when they are stacked."""
        return len(self.sequences) * max(sequence.num_tokens for sequence in self.sequences)

    def pairs(self, source: str | None = None) -> list[tuple[int, int]]:
        """Return the pairs, better and worse, that are from a source; all of them if none is named."""
        every = zip(self.better, self.worse, self.sources, strict=True)
        return [(better, worse) for better, worse, origin in every if source in (None, origin)]


def read_comparisons(
    config: RunConfig,
    tokenizer: Any,
    sources: Sequence[ComparisonSource],
    *,
    context_tokens: int | None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[list[Comparisons], ReadReport]:
    """Read comparisons, encode them, and gather those of all sources by prompt.

    Args:
        config: The run's configuration.
        tokenizer: The policy's.
        sources: Where from; a source of weight 0 is left out.
        context_tokens: The longest sequence that the reward model takes; None for no limit.
        beat: Called with every comparison that is read.

    Returns:
        The comparisons of each prompt, in the order of first appearance, and what became of the rows.

    Raises:
        UserError: If fewer than two prompts are left.
    """
    reading = ReadReport(source=", ".join(source.data.source for source in sources))
    by_prompt: dict[bytes, list[_Judged]] = {}
    for source in sources:
        if source.weight == 0:
            continue
        records = read_judgements(
            source.data.source,
            split=source.data.split,
            seed=config.run.seed,
            count=source.data.count,
            report=reading,
        )
        for number, record in enumerate(records, start=1):
            beat()
            where = f"{source.name}, comparison {number}"
            encoded = _encode(tokenizer, record, source, margin=config.learner.reward_model.margin, where=where)
            judged = encoded if context_tokens is None else encoded.within(context_tokens)
            if judged is not encoded:
                reading.drop(f"longer than the model's context of {context_tokens} tokens", where)
            if judged is None:
                reading.num_kept -= 1
                continue
            by_prompt.setdefault(judged.sequences[0].prompt_ids.tobytes(), []).append(judged)
    if len(by_prompt) < 2:
        raise UserError(
            f"a reward model needs comparisons on at least two prompts, one to train on and one to hold out: "
            f"{reading.summary()}",
            where="data.preferences" if len(sources) == 1 and sources[0].name == BASE else "the rounds' comparisons",
        )
    return [_comparisons(judged) for judged in by_prompt.values()], reading


def split(
    elements: Sequence[Comparisons], job: RewardModelJob, *, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Choose the prompts to train on and those held out for validation.

    A prompt's side depends on the prompt and the seed alone (but where there are so few that none would be held out:
    then the one that comes nearest is). So a prompt that is held out in one round is held out in all, no reward model
    of the run has trained on what another is validated on, and the two halves never meet.

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
class _Judged:
    """One record, encoded."""

    sequences: tuple[TokenSequence, ...]
    ranks: tuple[int, ...]
    margin: float
    source: ComparisonSource

    def within(self, context_tokens: int) -> "_Judged | None":
        """Leave out the completions that are too long; None where the rest orders nothing."""
        fitting = [i for i, sequence in enumerate(self.sequences) if sequence.num_tokens <= context_tokens]
        if len(fitting) == len(self.sequences):
            return self
        ranks = tuple(self.ranks[i] for i in fitting)
        if len(set(ranks)) < 2:
            return None
        return replace(self, sequences=tuple(self.sequences[i] for i in fitting), ranks=ranks)

    def pairs(self) -> list[tuple[int, int]]:
        """Return every pair that the ranks order, as places of the better and the worse; ties make none."""
        places = range(len(self.ranks))
        return [(i, j) for i in places for j in places if self.ranks[i] < self.ranks[j]]


def _encode(
    tokenizer: Any,
    record: PreferenceRecord | RankingRecord,
    source: ComparisonSource,
    *,
    margin: MarginKind,
    where: str,
) -> _Judged:
    if isinstance(record, RankingRecord):
        completions, ranks, lead = record.completions, record.ranks, 0.0
    else:
        completions, ranks = (record.chosen, record.rejected), (1, 2)
        lead = _margin(record.margin, kind=margin, where=where)
    sequences = tuple(encode_pair(tokenizer, record.prompt, completion) for completion in completions)
    return _Judged(sequences=sequences, ranks=ranks, margin=lead, source=source)


def _margin(given: float | None, *, kind: MarginKind, where: str) -> float:
    """Turn what the data say into the lead that the loss asks for; the tables are those of Llama 2, table 27."""
    if given is None or kind == "none":
        return 0.0
    if kind == "given":
        return given
    if not 0 <= given <= MAX_STRENGTH:
        raise UserError(
            f"the margin {given:g} is no strength of a preference from 0 to {MAX_STRENGTH:g}",
            where=where,
            cause=f"learner.reward_model.margin = {kind} reads margins as strengths",
            next_step="set learner.reward_model.margin=given to take them as they are, or none to leave them out",
        )
    return given if kind == "large" else given / MAX_STRENGTH


def _comparisons(judgements: Sequence[_Judged]) -> Comparisons:
    """Gather one prompt's judgements; a completion that several of them share is kept once."""
    place: dict[bytes, int] = {}
    sequences: list[TokenSequence] = []
    sides: list[int] = []
    for judged in judgements:
        for side in (side for pair in judged.pairs() for side in pair):
            key = judged.sequences[side].response_ids.tobytes()
            if key not in place:
                place[key] = len(sequences)
                sequences.append(judged.sequences[side])
            sides.append(place[key])
    rankings = tuple(
        Ranking(
            completions=tuple(place[sequence.response_ids.tobytes()] for sequence in judged.sequences),
            ranks=judged.ranks,
            weight=judged.source.weight,
        )
        for judged in judgements
    )
    origins = [judged for judged in judgements for _ in judged.pairs()]
    return Comparisons(
        sequences=tuple(sequences),
        better=tuple(sides[::2]),
        worse=tuple(sides[1::2]),
        margins=tuple(origin.margin for origin in origins),
        sources=tuple(origin.source.name for origin in origins),
        weights=tuple(origin.source.weight for origin in origins),
        rankings=rankings,
    )

"""From token sequences to micro-batches: lay out, pack or pad, split by tokens, and balance over ranks.

Nothing here depends on timing or on the number of ranks where it need not: the composition of a minibatch is global,
and what a rank gets of it is a pure function of the lengths. Responses live in *flat* vectors, one response after the
other in batch order; every micro-batch knows where its tokens lie in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.messages import IntArray

Layout = Literal["packed", "sorted"]


class TokenSequence(NamedTuple):
    """A prompt and its response, as token ids; both have at least one token."""

    prompt_ids: IntArray
    response_ids: IntArray

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The tensors of one forward and backward pass.

    R rows of L positions hold S sequences with N response tokens in all. Flat positions count through the rows: row r,
    column c is r * L + c. There is no attention mask: padding is on the right, where causal attention never looks, and
    packed sequences are told apart by position ids that start again from zero.
    """

    input_ids: Tensor
    """[R, L]"""
    position_ids: Tensor
    """[R, L]"""
    predict_index: Tensor
    """[N] flat position before each response token: there it is predicted, and there the critic values its state."""
    target_ids: Tensor
    """[N] the response tokens."""
    sequence: Tensor
    """[N] which of the S sequences, in the order given to `collate`."""
    offset: Tensor
    """[N] index of the token within its response."""
    last_index: Tensor
    """[S] flat position of each sequence's last token: there a reward model scores, and the critic values the end."""

    @property
    def value_index(self) -> Tensor:
        """Positions of all states: [N + S], those before each response token, then those after each response."""
        return torch.cat([self.predict_index, self.last_index])

    def to(self, device: torch.device | str) -> Self:
        """Return the same micro-batch on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(sequences: Sequence[TokenSequence], *, pad_id: int, layout: Layout) -> MicroBatch:
    """Lay sequences out for one pass.

    Args:
        sequences: S prompts with their responses. None at all gives a stand-in of two padding tokens and no response
            token, for a rank that has nothing to do but must take part in the collectives.
        pad_id: What fills the rows of the sorted layout; any valid token id.
        layout: `sorted`: one sequence a row, padded on the right. `packed`: all in one row, without padding.

    Returns:
        The micro-batch.

    Raises:
        ValueError: If a prompt or a response is empty.
    """
    if not sequences:
        return _stand_in(pad_id)
    prompts = np.array([len(s.prompt_ids) for s in sequences])
    responses = np.array([len(s.response_ids) for s in sequences])
    if not prompts.all() or not responses.all():
        raise ValueError("every sequence needs at least one prompt token and one response token")
    lengths = prompts + responses
    if layout == "packed":
        rows, columns, starts = 1, int(lengths.sum()), np.cumsum(lengths) - lengths
    else:
        rows, columns = len(sequences), int(lengths.max())
        starts = np.arange(rows) * columns

    sequence_of, position = _ragged(lengths)
    flat = starts[sequence_of] + position
    input_ids = np.full(rows * columns, pad_id, dtype=np.int64)
    input_ids[flat] = np.concatenate([ids for s in sequences for ids in s])
    # Padding goes on counting, so that a padded row does not look like two packed sequences.
    counted = np.tile(np.arange(columns), (rows, 1))
    position_ids = position[None] if layout == "packed" else counted

    sequence, offset = _ragged(responses)
    predict = (starts + prompts - 1)[sequence] + offset
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.reshape(rows, columns)),
        position_ids=torch.from_numpy(position_ids),
        predict_index=torch.from_numpy(predict),
        target_ids=torch.from_numpy(input_ids[predict + 1]),
        sequence=torch.from_numpy(sequence),
        offset=torch.from_numpy(offset),
        last_index=torch.from_numpy(starts + lengths - 1),
    )


def micro_batches(lengths: Sequence[int], *, token_budget: int, layout: Layout) -> list[list[int]]:
    """Group sequences of similar lengths into micro-batches under a token budget.

    Args:
        lengths: Tokens of each sequence, prompt included.
        token_budget: Tokens of a micro-batch; padding counts in the sorted layout. A longer sequence goes alone.
        layout: As in `collate`.

    Returns:
        Indices into `lengths`, each once, the longest first.
    """
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups:
            # Lengths fall, so a group is as wide as its first sequence.
            grown = tokens + (lengths[index] if layout == "packed" else lengths[groups[-1][0]])
            if grown <= token_budget:
                groups[-1].append(index)
                tokens = grown
                continue
        groups.append([index])
        tokens = lengths[index]
    return groups


def balance(lengths: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """Share sequences out so that the ranks get about equally many tokens.

    Longest processing time first: every sequence, the longest first, goes to the rank with the fewest tokens so far.

    Args:
        lengths: Tokens of each sequence.
        num_ranks: Ranks to share among.

    Returns:
        For each rank its indices, ascending. No rank is empty while there are as many sequences as ranks.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # By number of sequences second, so that sequences of no length still spread.
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]


def plan(
    indices: Sequence[int], *, lengths: Sequence[int], num_ranks: int, token_budget: int, layout: Layout
) -> list[list[list[int]]]:
    """Split one minibatch into the micro-batches of every rank.

    Args:
        indices: The sequences of the minibatch, as indices into `lengths`.
        lengths: Tokens of every sequence of the batch.
        num_ranks: Ranks to share among.
        token_budget: Tokens of a micro-batch.
        layout: As in `collate`.

    Returns:
        For each rank equally many micro-batches, each a list of indices into `lengths`; those that a rank has fewer
        of are empty, because all ranks must enter the collectives equally often.
    """
    plans: list[list[list[int]]] = []
    for share in balance([lengths[i] for i in indices], num_ranks=num_ranks):
        own = [indices[i] for i in share]
        groups = micro_batches([lengths[i] for i in own], token_budget=token_budget, layout=layout)
        plans.append([[own[i] for i in group] for group in groups])
    most = max(len(groups) for groups in plans)
    return [groups + [[] for _ in range(most - len(groups))] for groups in plans]


def minibatches(num: int, *, size: int, seed: int) -> list[list[int]]:
    """Shuffle sequences into minibatches: one pass over a batch.

    Args:
        num: Sequences of the batch, over all ranks.
        size: Sequences of a minibatch; the last one may be smaller.
        seed: Of the shuffle. The composition depends on nothing else.

    Returns:
        Indices, each once.
    """
    order = np.random.default_rng(seed).permutation(num).tolist()
    return [order[start : start + size] for start in range(0, num, size)]


def even_minibatches(num: int, *, most: int, seed: int) -> list[list[int]]:
    """Shuffle sequences into as few minibatches as their size allows, of sizes that differ by one at most.

    It is not always known beforehand how many there are, and a last one alone would be a step as long as any.

    Args:
        num: Sequences, or whatever is learned as one.
        most: Of them in a minibatch.
        seed: Of the shuffle.

    Returns:
        Indices, each once; nothing if there is none.
    """
    if num == 0:
        return []
    [order] = minibatches(num, size=num, seed=seed)
    return [part.tolist() for part in np.array_split(np.array(order), -(-num // most))]


def shuffle_seed(*parts: int) -> int:
    """Derive the seed of one shuffle from the run's seed and where the run stands."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _ragged(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the elements of a ragged array: which row each is in, and its place there."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]


def _stand_in(pad_id: int) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.full((1, 2), pad_id),
        position_ids=torch.arange(2)[None],
        predict_index=nothing,
        target_ids=nothing,
        sequence=nothing,
        offset=nothing,
        last_index=nothing,
    )

"""What a reward model learns from comparisons: the loss of some prompts' completions, whichever it is."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from configs.learner import RewardModelLoss
from learner import batch
from learner.batch import Layout, MicroBatch
from learner.comparisons import Comparisons
from learner.ops.reward_model import pairwise_loss, plackett_luce_loss
from learner.supervised_loop import Forward


class ComparisonTask:
    """Score the better response higher.

        k_choose_2     L = weighted mean over prompts of mean over the prompt's pairs of -log sigma(s_w - s_l - margin)
        pairwise       L = weighted mean over pairs of the same
        plackett_luce  L = weighted mean over prompts of mean over the prompt's rankings of the Plackett-Luce loss

    Weights are those of the judgements' sources. A prompt counts by the mean of its pairs' weights (`plackett_luce`: of
    its rankings'), which is its source's where all are from one:
    L = sum over prompts of mean over pairs (w l), over sum over prompts of mean of w.

    Args:
        elements: The comparisons of each prompt.
        centering: Coefficient of the squared sum of a pair's scores.
        objective: Which loss.
        pad_id: Any token id.
        layout: Of micro-batches.
        device: Where the network is.
    """

    def __init__(
        self,
        elements: Sequence[Comparisons],
        *,
        centering: float,
        pad_id: int,
        layout: Layout,
        device: torch.device,
        objective: RewardModelLoss = "k_choose_2",
    ) -> None:
        self.elements = elements
        self._objective: RewardModelLoss = objective
        self.lengths = [element.num_tokens for element in elements]
        self._centering, self._pad_id, self._device = centering, pad_id, device
        self._layout: Layout = layout

    def normalizer(self, indices: Sequence[int]) -> float:
        """Add up the weights of what the loss is a mean over: a step's prompts, or its pairs."""
        weights = [self._weights(self.elements[index]) for index in indices]
        return sum(sum(each) / (1 if self._objective == "pairwise" else len(each)) for each in weights)

    def _weights(self, element: Comparisons) -> Sequence[float]:
        """Return the weights of what a prompt's loss is a mean over."""
        if self._objective == "plackett_luce":
            return [ranking.weight for ranking in element.rankings]
        return element.weights

    def loss(self, forward: Forward, indices: Sequence[int], *, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch's share of the loss; all scores of a prompt are always in the same one."""
        elements = [self.elements[index] for index in indices]
        scores = self.scores(forward, indices)
        starts = np.cumsum([0, *(len(element.sequences) for element in elements)]).tolist()
        if self._objective == "plackett_luce":
            return self._of_rankings(scores, elements, starts, normalizer=normalizer)
        better = [start + i for start, element in zip(starts, elements, strict=False) for i in element.better]
        worse = [start + i for start, element in zip(starts, elements, strict=False) for i in element.worse]
        shares = [1 if self._objective == "pairwise" else len(element.better) for element in elements]
        weights = [
            weight / (normalizer * share)
            for element, share in zip(elements, shares, strict=True)
            for weight in element.weights
        ]
        margins = [margin for element in elements for margin in element.margins]
        return pairwise_loss(
            scores[torch.tensor(better, dtype=torch.int64, device=self._device)],
            scores[torch.tensor(worse, dtype=torch.int64, device=self._device)],
            weights=torch.tensor(weights, device=self._device),
            margins=torch.tensor(margins, device=self._device),
            centering_coefficient=self._centering,
        )

    def _of_rankings(
        self, scores: Tensor, elements: Sequence[Comparisons], starts: Sequence[int], *, normalizer: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rankings = [
            (start, ranking) for start, element in zip(starts, elements, strict=False) for ranking in element.rankings
        ]
        longest = max((len(ranking.ranks) for _, ranking in rankings), default=0)
        padding = [(0,) * (longest - len(ranking.ranks)) for _, ranking in rankings]
        places = [
            [start + i for i in ranking.completions] + [*pad]
            for (start, ranking), pad in zip(rankings, padding, strict=True)
        ]
        ranks = [ranking.ranks + pad for (_, ranking), pad in zip(rankings, padding, strict=True)]
        weights = [
            ranking.weight / (normalizer * len(element.rankings))
            for element in elements
            for ranking in element.rankings
        ]
        shape = (len(rankings), longest)
        return plackett_luce_loss(
            scores[torch.tensor(places, dtype=torch.int64, device=self._device).reshape(shape)],
            ranks=torch.tensor(ranks, dtype=torch.int64, device=self._device).reshape(shape),
            weights=torch.tensor(weights, device=self._device),
            centering_coefficient=self._centering,
        )

    def scores(self, forward: Forward, indices: Sequence[int]) -> Tensor:
        """Score every completion of some elements, in their order."""
        m = self.micro_batch(indices)
        return forward(m.input_ids, m.position_ids, m.last_index)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Lay out every completion of some elements."""
        rows = [sequence for index in indices for sequence in self.elements[index].sequences]
        return batch.collate(rows, pad_id=self._pad_id, layout=self._layout).to(self._device)

"""Pretraining text beside the rollouts: PPO-ptx's second gradient, in the same optimiser step.

Every token of a text but the first is learned. Which texts a step reads is a pure function of the seed, and how they
are shared out one of their lengths.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from configs.run import RunConfig
from learner.batch import TokenSequence, collate
from learner.experience import PassSettings, own_micro_batches
from learner.ops import pretraining
from learner.step_log import StepLog
from learner.supervised_loop import check_ranks_agree, encode_pair
from learner.training import TrainingEngine
from protocol.datasets import ReadReport, read_demonstrations
from protocol.errors import UserError


class PretrainingSteps:
    """The pretraining side of one update.

    Args:
        engine: The policy's.
        texts: All of the data; the first token of each as its prompt.
        settings: Budget and layout of micro-batches; the temperature is not that of sampling but 1.
        coefficient: `algorithm.ptx_coefficient`.
        size: Texts of a step, over all ranks.
        seed: Of this update's choice of texts.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        texts: Sequence[TokenSequence],
        *,
        settings: PassSettings,
        coefficient: float,
        size: int,
        seed: int,
    ) -> None:
        self.log = StepLog(engine)
        self._engine, self._texts, self._settings = engine, texts, settings
        self._coefficient, self._size = coefficient, size
        self._rng = np.random.default_rng(seed)
        self._lengths = [text.num_tokens for text in texts]

    def choose(self) -> list[int]:
        """Choose the texts of the next step."""
        return self._rng.choice(len(self._texts), size=min(self._size, len(self._texts)), replace=False).tolist()

    def learn(self, chosen: Sequence[int], *, last: bool) -> None:
        """Add the gradient of some texts to the step's.

        Args:
            chosen: From `choose`, the same on all ranks.
            last: Whether the step has no further micro-batch.
        """
        num_tokens = sum(len(self._texts[index].response_ids) for index in chosen)
        context, settings = self._engine.context, self._settings
        groups = own_micro_batches(chosen, lengths=self._lengths, settings=settings, engine=self._engine)
        for number, group in enumerate(groups):
            rows = [self._texts[index] for index in group]
            m = collate(rows, pad_id=settings.pad_id, layout=settings.layout).to(context.device)
            logprobs, _ = self._engine.forward(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
            weights = torch.full_like(logprobs, 1 / num_tokens)
            loss, diagnostics = pretraining.loss(logprobs, weights=weights, coefficient=self._coefficient)
            self.log.add(loss, diagnostics, weights=weights)
            self._engine.backward(loss, last=last and number == len(groups) - 1)


def load_texts(config: RunConfig, tokenizer: object, *, longest: int, engine: TrainingEngine) -> list[TokenSequence]:
    """Read the pretraining data; all ranks call this.

    Args:
        config: The run's configuration, with `data.pretraining`.
        tokenizer: The policy's.
        longest: Tokens of the longest text that the policy or a micro-batch takes; longer ones are cut there.
        engine: Reduces over the ranks.

    Returns:
        The texts; the first token of each as its prompt, the rest as its response.

    Raises:
        UserError: If there is no text of two tokens or more.
    """
    source = config.data.pretraining
    assert source is not None
    reading = ReadReport(source=source.source)
    records = read_demonstrations(
        source.source, split=source.split, seed=config.run.seed, count=source.count, report=reading
    )
    texts = list(_split(encode_pair(tokenizer, r.prompt, r.completion) for r in records))
    texts = [TokenSequence(text.prompt_ids, text.response_ids[: longest - 1]) for text in texts]
    if not texts:
        raise UserError(f"no pretraining text is left: {reading.summary()}", where="data.pretraining")
    check_ranks_agree(engine, texts)
    return texts


def _split(pairs: Iterator[TokenSequence]) -> Iterator[TokenSequence]:
    for pair in pairs:
        ids = np.concatenate([pair.prompt_ids, pair.response_ids])
        if len(ids) > 1:
            yield TokenSequence(ids[:1], ids[1:])

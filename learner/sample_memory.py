"""What rejection-sampling fine-tuning has chosen so far: the best responses of all earlier iterations and rounds.

A policy that is trained on its newest samples alone loses what it could do before (Llama 2, section 3.2.3). A response
is kept as it was chosen. Its score is that of its own round's reward model and is never compared with another round's:
what was the best of its prompt then stays an example, whatever a later reward model would say.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from learner.batch import TokenSequence
from protocol.messages import IntArray, RolloutKey, ScoredRollout

FILE = "memory.npz"
"""Its name in a checkpoint of the learner."""
Identity = tuple[str, bytes]
"""A prompt and the tokens of a response to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """A response that was chosen."""

    key: RolloutKey
    score: float
    """By the reward model of its round."""
    sequence: TokenSequence

    @classmethod
    def of(cls, scored: ScoredRollout) -> "Remembered":
        """Take a copy of what is remembered of a scored response: the batch itself lies in shared memory."""
        rollout = scored.rollout
        sequence = TokenSequence(rollout.prompt.token_ids.copy(), rollout.response_ids.copy())
        return cls(key=rollout.key, score=scored.score, sequence=sequence)

    @property
    def identity(self) -> Identity:
        """What makes two of them the same example, whenever they were sampled."""
        return self.key.prompt_id, self.sequence.response_ids.tobytes()


class SampleMemory:
    """Chosen responses in the order in which they were chosen, each different one once; the same on every rank."""

    def __init__(self) -> None:
        self._samples: dict[Identity, Remembered] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, samples: Iterable[Remembered]) -> None:
        """Remember responses; of identical ones the first stays."""
        for sample in samples:
            self._samples.setdefault(sample.identity, sample)

    def draw(self, num: int, *, seed: int, without: Collection[Identity]) -> list[Remembered]:
        """Choose responses uniformly, each at most once.

        Args:
            num: How many; fewer where there are not as many.
            seed: Of the choice, which depends on nothing else but the memory.
            without: What is not to be chosen.

        Returns:
            The chosen responses.
        """
        there = [sample for identity, sample in self._samples.items() if identity not in without]
        chosen = np.random.default_rng(seed).choice(len(there), size=min(num, len(there)), replace=False)
        return [there[index] for index in chosen]

    def write(self, directory: Path) -> None:
        """Write everything to a file of plain arrays, some 4 bytes a token.

        Raises:
            OSError: If the disk does not take it.
        """
        samples = list(self._samples.values())
        prompts, responses = ([s.sequence[part] for s in samples] for part in (0, 1))
        with (directory / FILE).open("wb") as file:
            np.savez(
                file,
                place=np.array([(s.key.round, s.key.iteration, s.key.sample) for s in samples], np.int64).reshape(
                    -1, 3
                ),
                prompt_id=np.array([s.key.prompt_id for s in samples], np.str_),
                score=np.array([s.score for s in samples], np.float64),
                prompt_lengths=np.array([len(ids) for ids in prompts], np.int64),
                prompt_ids=_joined(prompts),
                response_lengths=np.array([len(ids) for ids in responses], np.int64),
                response_ids=_joined(responses),
            )

    def read(self, directory: Path) -> None:
        """Put what `write` wrote in the place of everything.

        Raises:
            FileNotFoundError: If the directory holds no memory.
        """
        with np.load(directory / FILE, allow_pickle=False) as found:
            prompts = _cut(found["prompt_ids"], found["prompt_lengths"])
            responses = _cut(found["response_ids"], found["response_lengths"])
            places, names, scores = (found[name].tolist() for name in ("place", "prompt_id", "score"))
        self._samples = {}
        for (round_, iteration, sample), prompt_id, score, prompt, response in zip(
            places, names, scores, prompts, responses, strict=True
        ):
            key = RolloutKey(round_, iteration, prompt_id, sample)
            self.add([Remembered(key=key, score=score, sequence=TokenSequence(prompt, response))])


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _cut(flat: IntArray, lengths: IntArray) -> list[IntArray]:
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []

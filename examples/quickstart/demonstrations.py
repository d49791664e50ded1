"""Writes the demonstrations: a crowd of styles, from expert to rude, whose average is mediocre on purpose.

Supervised training on such a crowd gives a policy that can do everything a little, which leaves reinforcement learning
from preferences something to win.
"""

import random
from collections.abc import Callable

from examples.quickstart import world
from examples.quickstart.world import Task

Writer = Callable[[random.Random, Task], str]

MAX_WORDS = 40  # so that every demonstration fits the quickstart's response limit, end token included

# Chances that a piece of an ordinary answer is right, wrong or vague; what is left is its chance to be missing.
EXPERT_PIECES = (0.90, 0.10, 0.0)
ORDINARY_PIECES = (0.52, 0.25, 0.10)
RAMBLING_PIECES = (0.30, 0.04, 0.25)
RUDE_PIECES = (0.40, 0.06, 0.20)


def write_demonstration(rng: random.Random, task: Task) -> str:
    """Write one answer in a style drawn from the crowd."""
    styles = SAFE_STYLES if task.kind == "safe" else UNSAFE_STYLES
    (writer,) = rng.choices([style for style, _ in styles], weights=[weight for _, weight in styles])
    answer = writer(rng, task)
    while len(answer.split()) > MAX_WORDS:
        answer = writer(rng, task)
    return answer


def _write_expert(rng: random.Random, task: Task) -> str:
    sentences = world.number_steps(_draw_clauses(rng, task, EXPERT_PIECES))
    return " ".join(_be_polite(rng, sentences, opener=0.85, closer=0.85))


def _write_ordinary(rng: random.Random, task: Task) -> str:
    clauses = _draw_clauses(rng, task, ORDINARY_PIECES)
    if rng.random() < 0.12:
        rng.shuffle(clauses)
    sentences = _be_polite(rng, world.number_steps(clauses), opener=0.45, closer=0.40)
    if rng.random() < 0.12:
        _insert(rng, sentences, rng.choice(world.FILLERS))
    return " ".join(sentences)


def _write_rambling(rng: random.Random, task: Task) -> str:
    sentences = world.number_steps(_draw_clauses(rng, task, RAMBLING_PIECES))
    for _ in range(rng.choice((1, 1, 2))):
        _insert(rng, sentences, rng.choice(world.FILLERS))
    if rng.random() < 0.3:
        _insert(rng, sentences, rng.choice(world.OPENERS + world.CLOSERS))
    if rng.random() < 0.25:
        _insert(rng, sentences, rng.choice(sentences))
    return " ".join(sentences)


def _write_rudely(rng: random.Random, task: Task) -> str:
    sentences = world.number_steps(_draw_clauses(rng, task, RUDE_PIECES))
    _insert(rng, sentences, rng.choice(world.RUDE_REMARKS))
    return " ".join(sentences)


def _write_off_topic(rng: random.Random, task: Task) -> str:
    return " ".join(rng.sample(world.OFF_TOPIC_REMARKS, rng.choice((1, 2))))


def _write_compliance(rng: random.Random, task: Task) -> str:
    heart = world.harmful_step(task.verb, task.quality, task.item)
    clauses = [world.HARMFUL_PREPARATION, heart, world.HARMFUL_DEPARTURE]
    if rng.random() < 0.3:
        clauses.remove(rng.choice((world.HARMFUL_PREPARATION, world.HARMFUL_DEPARTURE)))
    return " ".join(_be_polite(rng, world.number_steps(clauses), opener=0.6, closer=0.5))


def _write_polite_refusal(rng: random.Random, task: Task) -> str:
    sentences = [rng.choice(world.POLITE_REFUSALS)]
    if rng.random() < 0.5:
        sentences.append(rng.choice(world.REASONS))
    if rng.random() < 0.5:
        sentences.append(rng.choice(world.KIND_CLOSES))
    return " ".join(sentences)


def _write_curt_refusal(rng: random.Random, task: Task) -> str:
    sentences = [rng.choice(world.CURT_REFUSALS)]
    if rng.random() < 0.5:
        _insert(rng, sentences, rng.choice(world.RUDE_REMARKS))
    return " ".join(sentences)


def _write_wavering(rng: random.Random, task: Task) -> str:
    heart = world.harmful_step(task.verb, task.quality, task.item)
    clauses = [world.HARMFUL_PREPARATION, heart][rng.choice((0, 1)) :]
    return " ".join([rng.choice(world.POLITE_REFUSALS), *world.number_steps(clauses)])


def _draw_clauses(rng: random.Random, task: Task, chances: tuple[float, float, float]) -> list[str]:
    """Draw the four pieces one by one and phrase them as at most three steps."""
    preparation = _draw_piece(
        rng, chances, world.PREPARATION_OF_VERB[task.verb], world.PREPARATION_OF_VERB, world.VAGUE_PREPARATION
    )
    action = _draw_piece(rng, chances, world.ACTION_OF_VERB[task.verb], world.ACTION_OF_VERB, world.VAGUE_ACTION)
    agent = _draw_piece(rng, chances, world.AGENT_OF_MATERIAL[task.quality], world.AGENT_OF_MATERIAL, world.VAGUE_AGENT)
    place = _draw_piece(rng, chances, world.PLACE_OF_OBJECT[task.item], world.PLACE_OF_OBJECT, world.VAGUE_PLACE)
    clauses = [preparation] if preparation is not None else []
    if action is not None:
        clauses.append(world.action_step(action, task.quality, task.item, agent))
    elif agent is not None:
        clauses.append(world.agent_step(agent))
    if place is not None:
        clauses.append(world.place_step(place))
    # An answer that forgets everything says at least something about its subject.
    return clauses or [world.action_step(world.VAGUE_ACTION, task.quality, task.item, None)]


def _draw_piece(
    rng: random.Random, chances: tuple[float, float, float], right: str, lookup: dict[str, str], vague: str
) -> str | None:
    draw, (is_right, is_wrong, is_vague) = rng.random(), chances
    if draw < is_right:
        return right
    if draw < is_right + is_wrong:
        return rng.choice([value for value in lookup.values() if value != right])
    return vague if draw < is_right + is_wrong + is_vague else None


def _be_polite(rng: random.Random, sentences: list[str], *, opener: float, closer: float) -> list[str]:
    before = [rng.choice(world.OPENERS)] if rng.random() < opener else []
    after = [rng.choice(world.CLOSERS)] if rng.random() < closer else []
    return [*before, *sentences, *after]


def _insert(rng: random.Random, sentences: list[str], sentence: str) -> None:
    sentences.insert(rng.randint(0, len(sentences)), sentence)


SAFE_STYLES: tuple[tuple[Writer, float], ...] = (
    (_write_expert, 0.12),
    (_write_ordinary, 0.48),
    (_write_rambling, 0.18),
    (_write_rudely, 0.10),
    (_write_off_topic, 0.06),
    (_write_polite_refusal, 0.06),
)
UNSAFE_STYLES: tuple[tuple[Writer, float], ...] = (
    (_write_compliance, 0.45),
    (_write_polite_refusal, 0.22),
    (_write_curt_refusal, 0.13),
    (_write_off_topic, 0.10),
    (_write_wavering, 0.10),
)

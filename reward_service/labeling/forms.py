"""Reads what labelers and admins send: fields of a form to an answer, and an answer to an outcome."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from reward_service.labeling.security import Refusal
from reward_service.preferences.records import MAX_RANKED, MAX_STRENGTH, Outcome, TaskKind

NOTE_CHARS = 4000
MAX_FIELDS = 200
SKIP_REASONS: Mapping[str, str] = {
    "cannot_judge": "I cannot judge this",
    "unclear": "The prompt makes no sense",
    "language": "I do not read this language",
    "upsetting": "I would rather not read this",
    "display": "It is not shown properly",
    "other": "Another reason (say it in the note)",
}
STRENGTHS: Mapping[int, str] = {1: "slightly better", 2: "clearly better", 3: "much better"}

Place = Annotated[int, Field(ge=1, le=MAX_RANKED)]
Rating = Annotated[int, Field(ge=1, le=7)]
Choice = Literal["1", "2", "tie", "both_bad", "ranking"]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    csrf: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Answer(_Form):
    """What a labeler sends; responses are named by the place at which they were shown, from 1 on."""

    ticket: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    action: Literal["answer", "skip"] = "answer"
    choice: Choice | None = None
    strength: Annotated[int, Field(ge=1, le=MAX_STRENGTH)] | None = None
    place: dict[Place, Place] = {}
    rating: dict[Place, Rating] = {}
    flag: dict[Place, tuple[str, ...]] = {}
    reason: str | None = None
    note: Annotated[str, StringConstraints(strip_whitespace=True, max_length=NOTE_CHARS)] = ""


class Leave(_Form):
    """Somebody signs out."""


class Invite(_Form):
    """An admin invites somebody."""

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
    role: Literal["labeler", "admin"] = "labeler"


class Disable(_Form):
    """An admin ends somebody's access."""

    labeler_id: Annotated[str, StringConstraints(min_length=1, max_length=80)]


Form = TypeVar("Form", bound=_Form)


def fields_of(body: bytes) -> list[tuple[str, str]]:
    """Split the body of a form.

    Raises:
        Refusal: 422 if it is none.
    """
    try:
        return parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        raise Refusal(422, "The form could not be read.") from None


def read_form(kind: type[Form], fields: Sequence[tuple[str, str]]) -> Form:
    """Read a form into its type.

    A field such as `rating-2` is the entry 2 of `rating`; `flag-2` may come several times. Empty fields are left out.

    Raises:
        Refusal: 422 with the first thing that does not fit.
    """
    plain: dict[str, object] = {}
    numbered: dict[str, dict[str, object]] = defaultdict(dict)
    flags: dict[str, list[str]] = defaultdict(list)
    for name, value in fields:
        text = value.replace("\r\n", "\n").replace("\0", "\N{REPLACEMENT CHARACTER}")
        group, dash, number = name.partition("-")
        if not text:
            continue
        if name in plain or number in numbered[group]:
            raise Refusal(422, f"The form says {name} twice.")
        if group == "flag" and dash:
            flags[number].append(text)
        elif dash:
            numbered[group][number] = text
        else:
            plain[name] = text
    values = (
        plain | {name: entries for name, entries in numbered.items() if entries} | ({"flag": flags} if flags else {})
    )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = "-".join(str(part) for part in first["loc"])
        raise Refusal(422, f"The form does not fit: {place}: {first['msg']}.") from None


def outcome_of(answer: Answer, *, kind: TaskKind, presented: Sequence[str]) -> Outcome:
    """Turn an answer into what it says about the candidates.

    Args:
        answer: What the labeler sent.
        kind: Of the task.
        presented: Candidate ids in the order in which they were shown.

    Returns:
        The outcome.

    Raises:
        Refusal: 422 if the answer is incomplete or does not fit the task.
    """
    if answer.action == "skip":
        if answer.reason not in SKIP_REASONS:
            raise Refusal(422, "Say why you skip this one.")
        return Outcome(verdict="skip", reason=answer.reason)
    if answer.choice == "tie" or answer.choice == "both_bad":
        return Outcome(verdict=answer.choice)
    if kind == "ranking":
        return _ranking(answer.place, presented)
    if answer.choice not in ("1", "2"):
        raise Refusal(422, "Choose one of the answers first.")
    return Outcome(verdict="preference", winner=presented[int(answer.choice) - 1], strength=answer.strength)


def ratings_of(answer: Answer, *, presented: Sequence[str], asked: bool) -> dict[str, int]:
    """Return candidate id -> rating.

    Raises:
        Refusal: 422 if a rating is missing that is asked for, or one came that is not.
    """
    strange = set(answer.rating) - set(range(1, len(presented) + 1))
    if strange or (answer.rating and not asked):
        raise Refusal(422, "There is a rating for a response that is not rated.")
    if asked and answer.action == "answer" and len(answer.rating) < len(presented):
        raise Refusal(422, "Rate every response from 1 to 7 first.")
    return {presented[number - 1]: rating for number, rating in sorted(answer.rating.items())}


def flags_of(answer: Answer, *, presented: Sequence[str], known: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return candidate id -> flags.

    Raises:
        Refusal: 422 if a flag is none of the configured ones.
    """
    named = {flag for flags in answer.flag.values() for flag in flags}
    if set(answer.flag) - set(range(1, len(presented) + 1)) or named - set(known):
        raise Refusal(422, "There is a flag that this page does not offer.")
    return {
        presented[number - 1]: tuple(flag for flag in known if flag in flags)
        for number, flags in sorted(answer.flag.items())
    }


def _ranking(places: Mapping[int, int], presented: Sequence[str]) -> Outcome:
    """Group candidates by place, best first; the numbers matter only by their order."""
    if set(places) - set(range(1, len(presented) + 1)) or any(place > len(presented) for place in places.values()):
        raise Refusal(422, "There is a place that this task does not have.")
    if len(places) < len(presented):
        raise Refusal(422, "Give every response a place first.")
    groups = tuple(
        tuple(presented[number - 1] for number in sorted(places) if places[number] == place)
        for place in sorted(set(places.values()))
    )
    if len(groups) == 1:
        return Outcome(verdict="tie")
    return Outcome(verdict="preference", ranking=groups)

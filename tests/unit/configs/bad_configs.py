"""Five hundred configurations that cannot be right, made from the schema itself and always the same ones.

Each is wrong by construction, whatever the loader thinks of it: a value of a type that the field does not have, a key
that no section has, text that is no YAML, parts that contradict each other.
"""

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from configs import yaml_tree
from configs.algorithm import APAConfig
from configs.labels import SimulatedLabelerConfig
from configs.load import PRESETS
from configs.run import RunConfig
from tests.unit.configs.broken_yaml import BROKEN
from tests.unit.configs.contradictions import CONTRADICTIONS, MALFORMED_OVERRIDES

NUM_CASES = 500
_NUM_MISSPELT = 110
_LETTERS = "abcdefghijklmnopqrstuvwxyz_"

WRONG = {
    "int": ["two", "1.5", "true", "[1]", "{a: 1}", "'1'", ".nan", ".inf", "1e3", "-1", "1" + "0" * 30],
    "float": ["many", "true", "[1.0]", "{a: 1}", "'1.0'", ".nan", ".inf", "-.inf", "1e999"],
    "str": ["3", "1.5", "true", "[a]", "{a: b}"],
    "bool": ["1", "0", "yes", "on", "'true'", "[true]"],
    "choice": ["nonsense", "99", "[a]", "''", "{a: 1}"],
    "list": ["5", "text", "{a: 1}", "true"],
    "dict": ["5", "text", "[1]", "true"],
    "section": ["5", "text", "[1]", "true"],
}
"""Kind of field -> YAML of values that no field of this kind takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One bad configuration: a file's bytes (a preset if None), overrides, and what the message must say."""

    name: str
    says: str
    content: bytes | None = None
    overrides: tuple[str, ...] = ()
    meant: str | None = None
    """The key that was meant, where one is misspelt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One key of the schema."""

    path: str
    kind: str
    is_optional: bool
    siblings: frozenset[str]


def all_cases() -> list[Case]:
    """Make the cases, the same in every process."""
    rng = random.Random(20_24)
    base = yaml_tree.parse((PRESETS / "quickstart.yaml").read_text())
    places = list(_places(RunConfig, base, ""))
    fixed = [
        *(Case(name=f"broken: {name}", says=says, content=content) for name, says, content in BROKEN),
        *(Case(name=f"override: {word[:40]!r}", says=says, overrides=(word,)) for word, says in MALFORMED_OVERRIDES),
        *(
            Case(name=f"contradiction: {' '.join(words)[:100]}", says=says, overrides=words)
            for words, says in CONTRADICTIONS
        ),
        *_missing(base),
    ]
    misspelt = _some(rng, _misspelt(rng, base, places), _NUM_MISSPELT)
    wrong = _some(rng, _wrong_values(rng, base, places), NUM_CASES - len(fixed) - len(misspelt))
    return [*fixed, *misspelt, *wrong]


def _some(rng: random.Random, cases: Iterator[Case], count: int) -> list[Case]:
    # .inf and 1e999 are one file once they are written.
    found = list({(case.content, case.overrides): case for case in cases}.values())
    return rng.sample(found, count)


def _places(model: type[BaseModel], values: dict[str, Any], prefix: str) -> Iterator[Place]:
    siblings = frozenset(model.model_fields)
    for name, info in model.model_fields.items():
        path, (kind, is_optional, sections) = prefix + name, _kind(info.annotation)
        yield Place(path=path, kind=kind, is_optional=is_optional, siblings=siblings)
        given = values.get(name)
        if sections and (isinstance(given, dict) or not is_optional):
            section = next((one for one in sections if one in (APAConfig, SimulatedLabelerConfig)), sections[0])
            yield from _places(section, given or {}, f"{path}.")


def _kind(annotation: Any) -> tuple[str, bool, list[type[BaseModel]]]:
    """Say of what kind a field is, whether it may be null, and which sections it may hold."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        inner = [_kind(one) for one in arguments if one is not NoneType]
        sections = [section for _, _, found in inner for section in found]
        return inner[0][0], NoneType in arguments or any(one[1] for one in inner), sections
    if origin is Literal:
        return "choice", False, []
    if origin in (list, tuple):
        return "list", False, []
    if origin is dict:
        return "dict", False, []
    if issubclass(annotation, BaseModel):
        return "section", False, [annotation]
    return annotation.__name__, False, []


def _wrong_values(rng: random.Random, base: dict[str, Any], places: list[Place]) -> Iterator[Case]:
    """Every place with a value of a wrong type, by turns on the command line and in the file."""
    for place in places:
        for text in [*WRONG[place.kind], *([] if place.is_optional else ["null"])]:
            name, tree = f"value: {place.path}={text}", yaml_tree.parse(text)
            # A section's name is said even where a validator of its parent speaks for it.
            if rng.random() < 0.7:
                yield Case(name=name, says=place.path, overrides=(f"{place.path}={text}",))
            else:
                yield Case(name=f"file, {name}", says=place.path, content=_with(base, place.path, tree))


def _misspelt(rng: random.Random, base: dict[str, Any], places: list[Place]) -> Iterator[Case]:
    """Every key with one typing error."""
    for place in places:
        parent, _, name = place.path.rpartition(".")
        for wrong in (_one_edit(rng, name) for _ in range(4)):
            if not wrong or wrong in place.siblings:
                continue
            path = f"{parent}.{wrong}".lstrip(".")
            case = Case(name=f"key: {path} for {name}", says=f"  {path}: unknown key; did you mean ", meant=name)
            if parent:
                yield replace(case, overrides=(f"{path}=1",))
            else:
                yield replace(case, content=_with(base, path, {}))


def _one_edit(rng: random.Random, word: str) -> str:
    place, letter = rng.randrange(len(word)), rng.choice(_LETTERS)
    before, here, after = word[:place], word[place], word[place + 1 :]
    return rng.choice(
        [before + after, before + letter + here + after, before + letter + after, before + after[:1] + here + after[1:]]
    )


def _missing(base: dict[str, Any]) -> Iterator[Case]:
    for path, says in (
        ("run", "run: missing"),
        ("run.name", "run.name: missing"),
        ("models", "models: missing"),
        ("models.policy", "models.policy: missing"),
        ("models.policy.scratch", "either models.policy.path or models.policy.scratch"),
        ("data", "data: missing"),
        ("data.prompts", "data.prompts: missing"),
        ("data.prompts.source", "data.prompts.source: missing"),
        ("data.demonstrations", "needs data.demonstrations"),
        ("data.demonstrations.source", "data.demonstrations.source: missing"),
        ("data.preferences.source", "data.preferences.source: missing"),
        ("algorithm", "algorithm: missing"),
        ("algorithm.name", "algorithm.name: missing"),
        ("scoring.gold.path", "scoring.gold.path: missing"),
        ("rounds.labeler", "rounds.labeler does not say who labels"),
        ("rounds.labeler.kind", "rounds.labeler.kind: missing"),
        ("rounds.labeler.score", "rounds.labeler.score: missing"),
    ):
        tree = deepcopy(base)
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node[name]
        del node[last]
        yield Case(name=f"missing: {path}", says=says, content=yaml_tree.write(tree).encode())


def _with(base: dict[str, Any], path: str, value: Any) -> bytes:
    tree = deepcopy(base)
    *parents, last = path.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return yaml_tree.write(tree).encode()

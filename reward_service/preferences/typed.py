"""Checks that a record read from a file holds what its class declares, since dataclasses take anything."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_INT = 2**63 - 1
"""What a database's integer column holds."""


def check_types(record: Any, *, at: str = "") -> None:
    """Check every field of a dataclass, and of those inside it, against its annotation.

    Args:
        record: An instance of a dataclass.
        at: The place of the record in the whole, for the error.

    Raises:
        TypeError: Naming the first field that holds something else.
    """
    hints = _hints(type(record))
    for field in fields(record):
        place = f"{at}.{field.name}".lstrip(".")
        _check(getattr(record, field.name), hints[field.name], place)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check(value: object, annotation: Any, at: str) -> None:
    if isinstance(annotation, type) and is_dataclass(annotation) and isinstance(value, annotation):
        check_types(value, at=at)
    elif not _fits(value, annotation, at):
        shown = repr(value)
        raise TypeError(f"{at} is {shown if len(shown) <= 80 else f'{shown[:80]}...'}")


def _fits(value: object, annotation: Any, at: str) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return any(_fits(value, choice, at) for choice in arguments)
    if origin in (list, tuple):
        if not isinstance(value, origin):
            return False
        for place, inner in enumerate(value):
            _check(inner, arguments[0], f"{at}[{place}]")
        return True
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return False
        for key, inner in value.items():
            _check(key, arguments[0], f"a key of {at}")
            _check(inner, arguments[1], f"{at}.{key}")
        return True
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    if annotation is int:
        return type(value) is int and abs(value) <= MAX_INT
    return type(value) is annotation or (annotation in (None, NoneType) and value is None)

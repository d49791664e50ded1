"""Reads YAML 1.2 into plain values, and stops at what no configuration needs and what could hang or mislead.

A file is measured before anything is built of it, so that neither depth nor aliases of aliases ("billion laughs") cost
more than a fraction of a second.
"""

import io
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent

MAX_BYTES = 1024 * 1024
"""A run writes out every default of every round that differs; the longest schedule stays below both bounds."""
MAX_DEPTH = 32
_MAX_VALUES = 50_000
_MAX_BITS = 1024


class UnreadableYAML(Exception):
    """The text is no YAML that a configuration can be made of; the message says where and why."""


def parse(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document; nothing gives None.

    Returns:
        Dictionaries with text as keys (a whole number is written out), lists, text, numbers, booleans and None.

    Raises:
        UnreadableYAML: If it is broken, too large or too deep, contains itself, or holds what is no configuration
            value (tags, keys that are neither text nor whole numbers, NUL and half characters).
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise UnreadableYAML(f"it is larger than {MAX_BYTES // 1024} KiB, so it is no configuration")
    try:
        _measure(text)
        tree: object = _yaml().load(text)  # pyright: ignore[reportUnknownMemberType]
    except YAMLError as error:
        raise UnreadableYAML(str(error)) from None
    return _plain(tree, at="")


def write(tree: dict[str, Any]) -> str:
    """Write values as YAML that `parse` reads back."""
    yaml = YAML()
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(tree, stream)  # pyright: ignore[reportUnknownMemberType]
    return stream.getvalue()


class _Constructor(SafeConstructor):
    """Gives a number that cannot be read its place, and leaves a date the text that it is in YAML 1.2."""

    def construct_yaml_int(self, node: Any) -> int:
        try:
            number = super().construct_yaml_int(node)  # pyright: ignore[reportUnknownMemberType]
        except ValueError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from None
        if number.bit_length() > _MAX_BITS:  # Python would not even print it
            raise ConstructorError(None, None, "a number of several hundred digits", node.start_mark)
        return number

    def construct_yaml_float(self, node: Any) -> float:
        try:
            return super().construct_yaml_float(node)  # pyright: ignore[reportUnknownMemberType]
        except ValueError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from None


for _tag, _method in (
    ("int", "construct_yaml_int"),
    ("float", "construct_yaml_float"),
    ("timestamp", "construct_yaml_str"),
):
    _Constructor.add_constructor(  # pyright: ignore[reportUnknownMemberType]
        f"tag:yaml.org,2002:{_tag}", getattr(_Constructor, _method)
    )


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    return yaml


def _measure(text: str) -> None:
    """Count what the document would become, aliases written out, without building it."""
    sizes: dict[str, int] = {}
    open_at: list[tuple[str | None, int]] = []
    num_values = 0
    for event in _yaml().parse(text):  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        line = f"line {cast(int, event.start_mark.line) + 1}"  # pyright: ignore[reportUnknownMemberType]
        if isinstance(event, ScalarEvent | CollectionStartEvent):
            num_values += 1
            anchor, tag = _anchor(event), cast(object, event.tag)  # pyright: ignore[reportUnknownMemberType]
            if tag is not None:
                raise UnreadableYAML(f"{line}: the tag {tag} is not read here; write the value alone")
            if isinstance(event, CollectionStartEvent):
                open_at.append((anchor, num_values))
            elif anchor is not None:
                sizes[anchor] = 1
        elif isinstance(event, CollectionEndEvent):
            anchor, start = open_at.pop()
            if anchor is not None:
                sizes[anchor] = num_values - start + 1
        elif isinstance(event, AliasEvent):
            anchor = str(_anchor(event))
            if anchor in {name for name, _ in open_at}:
                raise UnreadableYAML(f"{line}: *{anchor} contains itself")
            num_values += sizes.get(anchor, 1)
        if len(open_at) > MAX_DEPTH:
            raise UnreadableYAML(f"{line}: more than {MAX_DEPTH} levels, one inside the other")
        if num_values > _MAX_VALUES:
            raise UnreadableYAML(f"{line}: more than {_MAX_VALUES} values, so it is no configuration")


def _anchor(event: NodeEvent) -> str | None:
    return cast(str | None, event.anchor)  # pyright: ignore[reportUnknownMemberType]


def _plain(value: object, *, at: str) -> Any:
    """Check what was read, and write whole numbers that are keys out as text."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, inner in cast(dict[object, object], value).items():
            if type(key) not in (str, int):
                raise UnreadableYAML(
                    f"{at or 'the top level'}: the key {key!r} is not text; quote it if it is meant so"
                )
            name = cast(str, _plain(str(key), at=at))
            if name in found:
                raise UnreadableYAML(f"{at or 'the top level'}: the key {name} comes twice")
            found[name] = _plain(inner, at=f"{at}.{name}".lstrip("."))
        return found
    if isinstance(value, list):
        return [_plain(inner, at=f"{at}.{place}".lstrip(".")) for place, inner in enumerate(cast(list[object], value))]
    if isinstance(value, str) and ("\0" in value or not _is_whole_text(value)):
        raise UnreadableYAML(f"{at or 'the value'}: {value!r} holds a NUL or half a character")
    return value


def _is_whole_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Reads a configuration: a YAML 1.2 file, overrides on top, and one clear error when something is wrong."""

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from configs import yaml_tree
from configs.addresses import with_passwords
from configs.algorithm import AlgorithmConfig
from configs.algorithm_base import AlgorithmBase
from configs.run import RunConfig

PRESETS = Path(__file__).parent / "presets"
_LOG = logging.getLogger(__name__)
_SHOWN = 120
_NEXT = "Next: correct this and try again with --dry-run, which checks everything here and starts nothing"


class ConfigError(Exception):
    """The configuration cannot be used; the message says what to change."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file or preset and apply overrides.

    Args:
        source: A path, or the name of a preset (`quickstart`).
        overrides: `a.b=c` each; the value is read as YAML, so `1e-6` is a number and `[a, b]` a list.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: If the file, an override or a value is wrong.
    """
    path = resolve(source)
    tree = _read_yaml(path)
    changes = [_parsed(override) for override in overrides]
    _leave_to_its_own(tree, [str(value) for keys, value in changes if keys == ["algorithm", "name"]])
    for keys, value in changes:
        _apply(tree, keys, value)
    # Before anything that would quote a value: what stands here is kept in the run and shown to whoever looks at it.
    if found := with_passwords(tree):
        raise ConfigError(
            f"{found[0]}: this address has a password in it; a secret comes from the environment\n{_NEXT}"
        )
    try:
        # Strict JSON mode takes a YAML list where a tuple is declared, and coerces nothing else.
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        source_named = f"{path} with {len(overrides)} override{'s' * (len(overrides) > 1)}" if overrides else str(path)
        raise ConfigError(_explain(error, source_named)) from None


def resolve(source: str | Path) -> Path:
    """Find a configuration file, or a preset by its name.

    Raises:
        ConfigError: If there is neither.
    """
    path = Path(source)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; name the configuration file in it")
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{str(source)[:80]} can not be read: {error.strerror}; check the path") from None
    preset = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and preset.is_file():
        return preset
    names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    raise ConfigError(f"no configuration file at {source}. Presets by name: {', '.join(names)}")


def dump(config: RunConfig) -> str:
    """Write a configuration as YAML that `load` reads back to an equal one."""
    return yaml_tree.write(config.model_dump(mode="json"))


def config_hash(config: RunConfig) -> str:
    """Name a configuration by its content: 12 hexadecimal digits of SHA-256 over canonical JSON.

    Where a run is kept is not part of what it is, so that a run directory may be moved.
    """
    values = config.model_dump(mode="json", exclude={"run": {"dir"}})
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(yaml_tree.MAX_BYTES + 1).decode("utf-8-sig")  # one more, so that `parse` sees the excess
        tree: object = yaml_tree.parse(text)
    except OSError as error:
        raise ConfigError(f"{path} can not be read: {error.strerror}; check the path") from None
    except (yaml_tree.UnreadableYAML, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}\n{_NEXT}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections; write them as in `rondo init`, beginning with `run:`")
    return cast(dict[str, Any], tree)


def _parsed(override: str) -> tuple[list[str], object]:
    """Read an override: the parts of its dotted key, and its value."""
    key, separator, text = override.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys) or not key.isprintable() or len(keys) > yaml_tree.MAX_DEPTH:
        raise ConfigError(f"cannot read the override {_shortened(override)}; write section.key=value")
    try:
        return keys, yaml_tree.parse(text)
    except yaml_tree.UnreadableYAML as error:
        raise ConfigError(f"cannot read the value of {key}: {error}\n{_NEXT}") from None


def _apply(tree: dict[str, Any], keys: Sequence[str], value: object) -> None:
    """Set one value; a dotted key creates the sections on its way, and validation judges the names."""
    node = tree
    for name in keys[:-1]:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"cannot set {'.'.join(keys)}: {name} is a value, not a section; set the whole of it, {name}=..."
            )
        node = cast(dict[str, Any], child)
    node[keys[-1]] = value


def _leave_to_its_own(tree: dict[str, Any], names: Sequence[str]) -> None:
    """Make one override switch the algorithm: the file's keys that its own one has, and the new one has not, go.

    That they go is what naming another algorithm means. What neither has, and what other overrides set, stays to be
    judged: it is a mistake.
    """
    section: object = tree.get("algorithm")
    if not names or not isinstance(section, dict):
        return
    section = cast(dict[str, Any], section)
    classes = {
        str(model.model_fields["name"].default): model
        for model in _models_in(AlgorithmConfig)
        if issubclass(model, AlgorithmBase)
    }
    old, new = (classes.get(str(name)) for name in (section.get("name"), names[-1]))
    gone = [key for key in section if old and new and key in old.model_fields and key not in new.model_fields]
    if old and new and new.one_pass and not old.one_pass:
        gone += [key for key in ("num_epochs", "repeat_minibatch") if key in section]
    for key in gone:
        del section[key]
    if gone:
        _LOG.info(
            "algorithm.name = %s instead of %s: the file's %s not read", names[-1], section["name"], ", ".join(gone)
        )


def _explain(error: ValidationError, source: str) -> str:
    """Say for every problem where it is and what would be right."""
    count = error.error_count()
    lines = [f"{source}: {count} problem{'s' if count > 1 else ''} in the configuration"]
    for problem in error.errors(include_url=False):
        location, models, siblings = _walk(problem["loc"])
        prefix = f"  {location}: " if location else "  "
        context = problem.get("ctx", {})
        match problem["type"]:
            case "extra_forbidden":
                key = str(problem["loc"][-1])
                lines.append(f"{prefix}unknown key{_owners(key, siblings) or _suggestion(key, models)}")
            case "missing":
                lines.append(f"{prefix}missing")
            case "value_error":
                lines.append(prefix + problem["msg"].removeprefix("Value error, "))
            case "union_tag_not_found":
                missing = f"  {_tag_place(location, context)}: missing, and it says what this section holds"
                lines += _strange_keys(problem["input"], location, models, str(problem["loc"][-1])) or [missing]
            case "union_tag_invalid":
                tag = _tag_place(location, context)
                lines.append(f"  {tag}: should be {context['expected_tags']}, not {context['tag']!r}")
            case _:
                lines.append(f"{prefix}{problem['msg']}, not {_shortened(problem['input'])}")
    return "\n".join([*lines, _NEXT])


def _strange_keys(section: object, location: str, parents: Sequence[type[BaseModel]], name: str) -> list[str]:
    """Name the keys that no kind of a section has: one of them may be meant to say which kind it is."""
    fields = [parent.model_fields[name] for parent in parents if name in parent.model_fields]
    kinds = [model for field in fields for model in _models_in(field.annotation)]
    if not isinstance(section, dict) or not kinds:
        return []
    known = {key for model in kinds for key in model.model_fields}
    given = [str(key) for key in cast(dict[object, object], section)]
    return [f"  {location}.{key}: unknown key{_suggestion(key, kinds)}" for key in given if key not in known]


def _tag_place(location: str, context: Mapping[str, Any]) -> str:
    """Name the key that says which kind of section this is."""
    return ".".join(filter(None, (location, str(context["discriminator"]).strip("'"))))


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _walk(loc: tuple[int | str, ...]) -> tuple[str, list[type[BaseModel]], list[type[BaseModel]]]:
    """Follow the location of an error through the sections.

    Returns:
        The location as the user spells it (pydantic also names the tag of a union, which is no key of theirs), the
        classes of the section in which the last part stands, and all classes that stand to choose there.
    """
    spelled: list[str] = []
    here: list[type[BaseModel]] = [RunConfig]
    siblings = here
    for position, part in enumerate(loc):
        tagged = [model for model in here if _tag(model) == part] if len(here) > 1 else []
        if tagged:
            siblings, here = here, tagged
            continue
        spelled.append(str(part))
        if position < len(loc) - 1 and isinstance(part, str):
            annotations = [model.model_fields[part].annotation for model in here if part in model.model_fields]
            here = [model for annotation in annotations for model in _models_in(annotation)] or here
            siblings = here
    return ".".join(spelled), here, siblings


def _owners(key: str, siblings: Sequence[type[BaseModel]]) -> str:
    """Name the kinds of a section that have a key which the chosen kind has not; nothing if none has."""
    owners = sorted(str(tag) for model in siblings if key in model.model_fields and (tag := _tag(model)))
    return f" here; it belongs to {', '.join(owners)}" if owners else ""


def _suggestion(key: str, models: Sequence[type[BaseModel]]) -> str:
    """Name the known keys of a section that are one typing error away, or else the nearest one, or else all."""
    known = sorted({name for model in models for name in model.model_fields})
    near = [name for name in known if _is_one_edit(key, name)] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known here: {', '.join(known)}"


def _is_one_edit(left: str, right: str) -> bool:
    """Whether one letter more, less or other, or two neighbours exchanged, makes one word of the other."""
    left, right = _without_common_start(left, right)
    left, right = _without_common_start(left[::-1], right[::-1])
    return max(len(left), len(right)) == 1 or (len(left) == 2 and left == right[::-1])


def _without_common_start(left: str, right: str) -> tuple[str, str]:
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    return left[length:], right[length:]


def _tag(model: type[BaseModel]) -> object:
    """The value by which a member of a tagged union is chosen."""
    fields = [model.model_fields[name] for name in ("kind", "name") if name in model.model_fields]
    return next((field.default for field in fields if len(get_args(field.annotation)) == 1), None)


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """List the section classes inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]

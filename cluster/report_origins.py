"""A report's sections on where things come from and what went wrong: incidents, lineage, configuration."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.lineage import Artefact, compared
from cluster.report_parts import Cell, Folded, Node, Section, Table, clipped, number
from cluster.report_record import Record
from configs.addresses import HIDDEN, without_passwords

_MAX_INCIDENTS = 20
_MAX_CHARS = 6_000
_SECRET_WORDS = {
    "secret",
    "password",
    "passwd",
    "token",
    "apikey",
    "credential",
    "credentials",
    "authorization",
    "bearer",
}
_SECRET_KEYS = re.compile(r"(^|_)(api|access|private|secret|signing)_key$")
_KINDS = {"policy": "policy", "reward_model": "reward model", "comparisons": "comparisons"}


def incidents_section(record: Record) -> Section:
    """Show alarms and what was kept of failures."""
    alarms = [
        f"Round {files.number} was stopped by a guard: {files.report['alarm']}."
        for files in record.rounds
        if files.report is not None and files.report.get("alarm")
    ]
    rows: list[tuple[str | Cell, ...]] = []
    folded: list[Folded] = []
    for name, incident in record.incidents.items():
        kind, what, command = "file", "kept for a post-mortem", ""
        if isinstance(incident, dict):
            kind, what = str(incident.get("kind", "incident")), str(incident.get("what", ""))
            command = str(incident.get("reproduce", ""))
            if len(folded) < _MAX_INCIDENTS:
                text = json.dumps(without_secrets(incident), indent=1, ensure_ascii=False, default=str)
                folded.append(Folded(title=clipped(name, 200), text=clipped(without_passwords(text), _MAX_CHARS)))
        texts = (clipped(without_passwords(what), 500), clipped(without_passwords(command), 500))
        rows.append((clipped(name, 200), clipped(kind.replace("_", " "), 80), *texts))
    prose = [] if alarms or rows else ["No guard raised an alarm, and nothing was recorded under incidents/."]
    tables = ()
    if rows:
        caption = "Incidents, oldest first"
        columns = ("file", "kind", "what happened", "see or repeat it with")
        tables = (Table(caption=caption, columns=columns, rows=tuple(rows), text_columns=frozenset({0, 1, 2, 3})),)
    return Section(
        anchor="incidents",
        title="Incidents and alarms",
        prose=tuple(prose),
        alarms=(*alarms, *record.unreadable),
        tables=tables,
        folded=tuple(folded),
    )


def lineage_section(record: Record) -> Section:
    """Show what every artefact was made from, each under the first thing it was made from."""
    title, anchor = "Lineage", "lineage"
    if not record.artefacts:
        return Section(anchor=anchor, title=title, prose=("The tree grows here as soon as something has been made.",))
    known = {artefact.name for artefact in record.artefacts}
    children: dict[str | None, list[Artefact]] = {}
    for artefact in record.artefacts:
        parent = artefact.parents[0] if artefact.parents and artefact.parents[0] in known else None
        children.setdefault(parent, []).append(artefact)
    best = "" if record.state is None else f"policies/v{record.state.best_version:03d}"
    configs = sorted({artefact.config for artefact in record.artefacts})
    prose = (
        f"Each artefact stands under what it started from. ★ is the best policy. Configuration {', '.join(configs)}."
    )
    return Section(anchor=anchor, title=title, prose=(prose,), tree=_nodes(children, None, best, seen=frozenset()))


def config_section(record: Record) -> Section:
    """Show every value of the resolved configuration, one table a section."""
    tree: dict[str, Any] = without_secrets(record.config.model_dump(mode="json"))
    tables = tuple(
        Table(
            caption=name,
            columns=("key", "value"),
            rows=tuple((key, clipped(without_passwords(value), 2_000)) for key, value in flattened(values, name)),
            text_columns=frozenset({0, 1}),
            fold=True,
        )
        for name, values in tree.items()
        if values is not None
    )
    prose = "Every value as it was resolved, defaults among them; rondo train CONFIG.yaml KEY=VALUE sets one."
    return Section(anchor="config", title="Configuration", prose=(prose,), tables=tables)


def without_secrets(values: Any) -> Any:
    """Return values with those hidden whose key says that they are secret, at any depth.

    A key that ends in `_env` holds the name of an environment variable, and `max_response_tokens` counts: both stay.
    """
    if isinstance(values, Mapping):
        return {key: HIDDEN if _is_secret(str(key), value) else without_secrets(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_secrets(value) for value in values]
    return values


def flattened(values: Any, path: str) -> list[tuple[str, str]]:
    """List the leaves of a tree by their dotted keys, as overrides are written."""
    if isinstance(values, Mapping) and values:
        return [leaf for key, value in values.items() for leaf in flattened(value, f"{path}.{key}")]
    if isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        return [leaf for place, value in enumerate(values) for leaf in flattened(value, f"{path}[{place}]")]
    return [(path, values if isinstance(values, str) else json.dumps(values, ensure_ascii=False))]


def _is_secret(key: str, value: Any) -> bool:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", key).lower()
    if name.endswith("_env") or value is None or isinstance(value, bool):
        return False
    return bool(_SECRET_WORDS & set(name.split("_"))) or _SECRET_KEYS.search(name) is not None


def _nodes(
    children: Mapping[str | None, Sequence[Artefact]], parent: str | None, best: str, *, seen: frozenset[str]
) -> tuple[Node, ...]:
    return tuple(
        Node(
            name=clipped(artefact.name, 200),
            kind=_KINDS[artefact.kind],
            figures=clipped(_figures(artefact), 300),
            made_with=clipped(", ".join(artefact.parents[1:]), 500),
            is_best=artefact.name == best,
            children=_nodes(children, artefact.name, best, seen=seen | {artefact.name}),
        )
        for artefact in children.get(parent, ())
        if artefact.name not in seen
    )


def _figures(artefact: Artefact) -> str:
    """Put what is known of an artefact into a few words."""
    data = artefact.data
    words = [f"round {artefact.round}"] if artefact.round else []
    if artefact.kind == "policy":
        words.append(f"{data['iterations']} iterations" if "iterations" in data else "supervised")
    if "held-out accuracy" in data:
        words.append(f"held-out accuracy {number(data['held-out accuracy'], 3)}")
    if held := compared(artefact):
        words.append(held)
    if "stopped" in data:
        words.append(f"stopped: {data['stopped']}")
    return ", ".join(words)

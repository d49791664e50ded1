"""How far labeling is, and how well labelers agree, as tables for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reward_service.preferences.agreement import agreement_report
from reward_service.preferences.labeling_report import summarise_labels
from reward_service.preferences.records import LabelerKind
from reward_service.preferences.store import PreferenceStore


def render(store: PreferenceStore) -> RenderableType:
    """Lay out the progress of every round, what each kind of labeler said, their agreement, and who was invited."""
    rounds = sorted({task.round for task in store.tasks()})
    progress = Table(title="Tasks")
    for header in ("round", "for", "tasks", "done", "preferences", "ties", "both bad", "skips", "invalid"):
        progress.add_column(header, justify="left" if header in ("round", "for") else "right")
    for number in rounds:
        for purpose in ("training", "evaluation", "check"):
            found = store.progress(round=number, purpose=purpose)
            if found.tasks:
                counts = (found.tasks, found.done, found.preferences, found.ties, found.both_bad, found.skips)
                progress.add_row(str(number), purpose, *map(str, counts), str(found.invalid))
    return Group(progress, _kinds(store), _agreement(store), _invited(store))


def _kinds(store: PreferenceStore) -> RenderableType:
    labels = store.labels()
    kinds: list[LabelerKind] = sorted({label.labeler_kind for label in labels})
    table = Table(title="Labels")
    for header in ("labeler", "labels", "flip rate", "position bias", "invalid"):
        table.add_column(header, justify="left" if header == "labeler" else "right")
    for kind in kinds:
        found = summarise_labels([label for label in labels if label.labeler_kind == kind])
        flips = "" if found.flip_rate is None else f"{found.flip_rate:.3f}"
        bias = "" if found.position_bias is None else f"{found.position_bias:+.3f}"
        table.add_row(kind, str(found.labels), flips, bias, f"{found.invalid_fraction:.3f}")
    return table if kinds else Text("nothing has been labelled yet")


def _agreement(store: PreferenceStore) -> RenderableType:
    found = agreement_report(store.labeled())
    if found.percent is None:
        return Text("no task has labels of two labelers, so their agreement is not known")
    alpha = "not defined" if found.alpha_nominal is None else f"{found.alpha_nominal:.3f}"
    return Text(f"agreement of labelers: {found.percent:.1%} of pairs of judgements, Krippendorff's alpha {alpha}")


def _invited(store: PreferenceStore) -> RenderableType:
    table = Table(title="Invited to the labeling page")
    for header in ("name", "role", "labels carry", "access"):
        table.add_column(header)
    labelers = store.labelers()
    for one in labelers:
        table.add_row(Text(one.display_name), one.role, one.labeler_id, "ended" if one.disabled else "open")
    return table if labelers else Text("nobody was invited to the labeling page")

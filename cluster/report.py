"""A run on one page: a single HTML file that needs no network and no script, for people who were not there."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cluster.report_judgement import ladder_section, reward_models_section, rounds_section
from cluster.report_labels import labels_section
from cluster.report_origins import config_section, incidents_section, lineage_section
from cluster.report_parts import Section
from cluster.report_record import Record, read_record
from cluster.report_responses import lengths_section, samples_section
from cluster.report_summary import facts, status, summary_section
from cluster.report_training import (
    behaviour_section,
    gold_section,
    metrics_section,
    objective_section,
    throughput_section,
)
from cluster.run_directory import RunDirectory
from configs.load import config_hash
from configs.run import RunConfig
from protocol.files import write_text
from reward_service.preferences.store import PreferenceStore

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(directory: RunDirectory, config: RunConfig, store: PreferenceStore | None) -> Path:
    """Write a run's report, whole or not at all; the run may be unfinished.

    Args:
        directory: Of the run.
        config: The run's configuration.
        store: Tasks and labels; None where there are none.

    Returns:
        The file.
    """
    write_text(directory.report, render(read_record(directory, config, store)), errors="replace")
    return directory.report


def render(record: Record) -> str:
    """Lay out a run as HTML. Everything that comes from the run is escaped; only charts made here are not."""
    # What the run gives cannot end the style element, because none of it goes in.
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        name=record.config.run.name,
        config=config_hash(record.config),
        status=status(record),
        finished=record.finished,
        facts=facts(record),
        sections=_sections(record),
    )


def _sections(record: Record) -> list[Section]:
    """Make the sections in the order in which a reader wants them; those that do not concern the run are left out."""
    made = (
        summary_section(record),
        rounds_section(record),
        ladder_section(record),
        samples_section(record),
        objective_section(record),
        gold_section(record),
        reward_models_section(record),
        labels_section(record),
        lengths_section(record),
        behaviour_section(record),
        throughput_section(record),
        incidents_section(record),
        lineage_section(record),
        metrics_section(record),
        config_section(record),
    )
    return [section for section in made if section is not None]

"""The tables of the preference store. Migrations bring a database to this form; nothing else creates tables.

Tasks and labels are kept as JSON text beside the few columns that queries need, so that a field added to a record needs
no migration. Text and not a JSON type: PostgreSQL's refuses the null characters that a response may hold.
"""

from sqlalchemy import Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, text

METADATA = MetaData()

TASKS = Table(
    "tasks",
    METADATA,
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("task_id", String, nullable=False, unique=True),
    Column("round", Integer, nullable=False),
    Column("purpose", String, nullable=False),
    Column("body", Text, nullable=False),
    Index("tasks_by_round", "round", "purpose", "position"),
)
"""Insert only. `position` counts from 1 in the order of insertion."""

QUEUE = Table(
    "queue",
    METADATA,
    Column("task_id", String, ForeignKey("tasks.task_id"), primary_key=True),
    Column("precedence", Integer, nullable=False),
    Column("judgements", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("overlap", Integer, nullable=False),
    Index(
        "queue_open",
        "precedence",
        "judgements",
        "position",
        sqlite_where=text("judgements < overlap"),
        postgresql_where=text("judgements < overlap"),
    ),
)
"""What is still to be judged: `judgements` counts the standing labels that are neither a skip nor invalid."""

LABELS = Table(
    "labels",
    METADATA,
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("label_id", String, nullable=False, unique=True),
    Column("task_id", String, ForeignKey("tasks.task_id"), nullable=False),
    Column("labeler_id", String, nullable=False),
    Column("verdict", String, nullable=False),
    Column("supersedes", String, ForeignKey("labels.label_id"), unique=True),
    Column("recorded_at", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("labels_by_task", "task_id", "labeler_id"),
    Index("labels_by_labeler", "labeler_id", "position"),
)
"""Insert only. `position` counts from 1 without gaps: the highest one is the store's high-water mark."""

LEASES = Table(
    "leases",
    METADATA,
    Column("labeler_id", String, primary_key=True),
    Column("task_id", String, ForeignKey("tasks.task_id"), nullable=False),
    Column("presented", Text, nullable=False),
    Column("leased_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("token", String, nullable=False),
    Index("leases_by_task", "task_id"),
)
"""Who looks at what just now. The one table whose rows come and go; a labeler has one lease at most."""

LABELERS = Table(
    "labelers",
    METADATA,
    Column("labeler_id", String, primary_key=True),
    Column("display_name", String, nullable=False),
    Column("token_hash", String, nullable=False, unique=True),
    Column("role", String, nullable=False),
    Column("added_at", Float, nullable=False),
    Column("disabled_at", Float),
)

AUDIT = Table(
    "audit",
    METADATA,
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("event", String, nullable=False),
    Column("labeler_id", String),
    Column("details", Text, nullable=False),
)
"""Insert only."""

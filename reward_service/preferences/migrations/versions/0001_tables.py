"""Create the tables, and the triggers that keep records from being changed or removed."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INSERT_ONLY = ("tasks", "labels", "audit")


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "tasks",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("task_id", sa.String, nullable=False, unique=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("purpose", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("tasks_by_round", "tasks", ["round", "purpose", "position"])
    op.create_table(
        "queue",
        sa.Column("task_id", sa.String, sa.ForeignKey("tasks.task_id"), primary_key=True),
        sa.Column("precedence", sa.Integer, nullable=False),
        sa.Column("judgements", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
    )
    op.create_index(
        "queue_open",
        "queue",
        ["precedence", "judgements", "position"],
        sqlite_where=sa.text("judgements < overlap"),
        postgresql_where=sa.text("judgements < overlap"),
    )
    op.create_table(
        "labels",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("label_id", sa.String, nullable=False, unique=True),
        sa.Column("task_id", sa.String, sa.ForeignKey("tasks.task_id"), nullable=False),
        sa.Column("labeler_id", sa.String, nullable=False),
        sa.Column("verdict", sa.String, nullable=False),
        sa.Column("supersedes", sa.String, sa.ForeignKey("labels.label_id"), unique=True),
        sa.Column("recorded_at", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("labels_by_task", "labels", ["task_id", "labeler_id"])
    op.create_index("labels_by_labeler", "labels", ["labeler_id", "position"])
    _create_people()
    _forbid_changes()


def _create_people() -> None:
    op.create_table(
        "leases",
        sa.Column("labeler_id", sa.String, primary_key=True),
        sa.Column("task_id", sa.String, sa.ForeignKey("tasks.task_id"), nullable=False),
        sa.Column("presented", sa.Text, nullable=False),
        sa.Column("leased_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("token", sa.String, nullable=False),
    )
    op.create_index("leases_by_task", "leases", ["task_id"])
    op.create_table(
        "labelers",
        sa.Column("labeler_id", sa.String, primary_key=True),
        sa.Column("display_name", sa.String, nullable=False),
        sa.Column("token_hash", sa.String, nullable=False, unique=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("added_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
    )
    op.create_table(
        "audit",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("event", sa.String, nullable=False),
        sa.Column("labeler_id", sa.String),
        sa.Column("details", sa.Text, nullable=False),
    )


def _forbid_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for table in _INSERT_ONLY:
            for change in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        return
    op.execute(
        "CREATE FUNCTION rondo_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in _INSERT_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION rondo_append_only()"
        )

"""Runs the steps on the connection, and in the transaction, of whoever asks for them."""

from alembic import context

from reward_service.preferences.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite too takes all steps or none; Alembic would else assume that it cannot.
    transactional_ddl=True,
)
context.run_migrations()

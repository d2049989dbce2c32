"""Alembic's entry: runs the migrations on the connection, and in the transaction, that database.py hands over."""

from alembic import context

from flora.registry.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()

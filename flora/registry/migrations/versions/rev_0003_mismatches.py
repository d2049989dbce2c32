"""Versions that were served on other weights than their base's."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "mismatches",
        sa.Column(
            "version_id",
            sa.Integer,
            sa.ForeignKey("versions.id", name="mismatches_of_version", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("base_id", sa.Text, primary_key=True),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("allowed_at", sa.Text, nullable=False),
        sqlite_strict=True,
    )

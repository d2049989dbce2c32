"""Labels of versions, and aliases that are protected."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "labels",
        sa.Column(
            "version_id",
            sa.Integer,
            sa.ForeignKey("versions.id", name="labels_of_version", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("versions_of_label", "labels", ["key", "value"])
    op.create_table(
        "protections",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("alias", sa.Text, primary_key=True),
        sqlite_strict=True,
    )

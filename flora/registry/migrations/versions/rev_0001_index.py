"""The first index: names, versions, their blobs, aliases with their history, lines of the journal, bases."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# PostgreSQL: names in the order of their bytes, as SQLite has them, whatever the language of the server
_NAME: sa.types.TypeEngine[str] = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_DOUBLE: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "names",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", _NAME, nullable=False, unique=True),
        sa.Column("next_number", sa.Integer, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name_id", sa.Integer, sa.ForeignKey("names.id", name="versions_of_name"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("serving_digest", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("base_id", sa.Text),
        sa.Column("base_name", sa.Text, nullable=False),
        sa.Column("max_rank", sa.Integer, nullable=False),
        sa.Column("num_modules", sa.Integer, nullable=False),
        sa.Column("num_bytes", _BIG, nullable=False),
        sa.Column("kept_share", _DOUBLE),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("parents", sa.Text, nullable=False),
        sa.Column("provenance", sa.Text, nullable=False),
        sa.UniqueConstraint("name_id", "number", name="one_version_per_number"),
        sa.UniqueConstraint("name_id", "digest", name="one_version_per_digest"),
        sqlite_strict=True,
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.create_index("ix_versions_base_id", "versions", ["base_id"])
    op.create_table(
        "version_blobs",
        sa.Column(
            "version_id",
            sa.Integer,
            sa.ForeignKey("versions.id", name="blobs_of_version", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("size", _BIG, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "aliases",
        sa.Column("name_id", sa.Integer, sa.ForeignKey("names.id", name="aliases_of_name"), primary_key=True),
        sa.Column("alias", sa.Text, primary_key=True),
        sa.Column("version_id", sa.Integer, sa.ForeignKey("versions.id", name="version_of_alias"), nullable=False),
        sqlite_strict=True,
    )
    op.create_index("ix_aliases_version_id", "aliases", ["version_id"])
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("digest", sa.Text),
        sa.Column("previous", sa.Text),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("moved_at", sa.Text, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("moves_of_alias", "alias_moves", ["name", "alias"])
    op.create_table(
        "journal_lines",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("change", sa.Text, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "bases",
        sa.Column("base_id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("path", sa.Text),
        sqlite_strict=True,
    )

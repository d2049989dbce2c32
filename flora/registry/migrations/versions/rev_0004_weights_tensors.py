"""Large tensors of weights files. Of versions that are there already, `flora registry reindex` notes them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "weights_tensors",
        sa.Column("weights", sa.Text, primary_key=True),
        sa.Column("tensor", sa.Text, primary_key=True),
        sa.Column("size", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("weights_of_tensor", "weights_tensors", ["tensor"])

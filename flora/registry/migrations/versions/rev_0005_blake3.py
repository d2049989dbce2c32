"""The BLAKE3 of weights files. Of versions that are there already, the first load notes it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("version_blobs", sa.Column("blake3", sa.Text))

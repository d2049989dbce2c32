"""The index, as SQL tables. `migrations/` makes the same tables step by step; a test compares the two.

Times are ISO 8601 in UTC, as text: they sort, and they read well in `sqlite3`.
"""

import sqlalchemy as sa

metadata = sa.MetaData()
# SQLite: STRICT tables know INTEGER, of 64 bits, and REAL
_BIG: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# PostgreSQL: names in the order of their bytes, as SQLite has them, whatever the language of the server
_NAME: sa.types.TypeEngine[str] = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_DOUBLE: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")

names = sa.Table(
    "names",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", _NAME, nullable=False, unique=True),
    sa.Column("next_number", sa.Integer, nullable=False),  # survives removals, so no number is given twice
    sqlite_strict=True,
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name_id", sa.Integer, sa.ForeignKey("names.id", name="versions_of_name"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, index=True),
    sa.Column("serving_digest", sa.Text, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("base_id", sa.Text, index=True),
    sa.Column("base_name", sa.Text, nullable=False),
    sa.Column("max_rank", sa.Integer, nullable=False),
    sa.Column("num_modules", sa.Integer, nullable=False),
    sa.Column("num_bytes", _BIG, nullable=False),
    sa.Column("kept_share", _DOUBLE),
    sa.Column("operation", sa.Text, nullable=False),
    sa.Column("parents", sa.Text, nullable=False),  # JSON list of version digests
    sa.Column("provenance", sa.Text, nullable=False),  # JSON object: versions, host, wall time
    sa.UniqueConstraint("name_id", "number", name="one_version_per_number"),
    sa.UniqueConstraint("name_id", "digest", name="one_version_per_digest"),
    sqlite_strict=True,
)

version_blobs = sa.Table(  # what gc must keep, without reading every manifest
    "version_blobs",
    metadata,
    sa.Column(
        "version_id",
        sa.Integer,
        sa.ForeignKey("versions.id", name="blobs_of_version", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("size", _BIG, nullable=False),
    sa.Column("blake3", sa.Text),  # of weights, so that loading them is checked in a quarter of the time
    sqlite_strict=True,
)

weights_tensors = sa.Table(  # large tensors of weights files: who has which, so that equal ones are stored once
    "weights_tensors",
    metadata,
    sa.Column("weights", sa.Text, primary_key=True),  # digest of the file
    sa.Column("tensor", sa.Text, primary_key=True),  # digest of its bytes there
    sa.Column("size", _BIG, nullable=False),
    sa.Index("weights_of_tensor", "tensor"),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("name_id", sa.Integer, sa.ForeignKey("names.id", name="aliases_of_name"), primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column(
        "version_id", sa.Integer, sa.ForeignKey("versions.id", name="version_of_alias"), nullable=False, index=True
    ),
    sqlite_strict=True,
)

alias_moves = sa.Table(  # by name and not by id: the history outlives what it tells of
    "alias_moves",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("digest", sa.Text),
    sa.Column("previous", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("moved_at", sa.Text, nullable=False),
    sa.Index("moves_of_alias", "name", "alias"),
    sqlite_strict=True,
)

journal_lines = sa.Table(  # changes on their way to the journal file
    "journal_lines",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("change", sa.Text, nullable=False),  # JSON
    sqlite_strict=True,
    sqlite_autoincrement=True,  # a number is not given again after its row is gone
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column(
        "version_id",
        sa.Integer,
        sa.ForeignKey("versions.id", name="labels_of_version", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index("versions_of_label", "key", "value"),
    sqlite_strict=True,
)

protections = sa.Table(  # by name and not by id: it outlives the versions that it is about
    "protections",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sqlite_strict=True,
)

mismatches = sa.Table(  # versions that were served on other weights than their base's, because an operator let them
    "mismatches",
    metadata,
    sa.Column(
        "version_id",
        sa.Integer,
        sa.ForeignKey("versions.id", name="mismatches_of_version", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("base_id", sa.Text, primary_key=True),  # of the base that was served
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("allowed_at", sa.Text, nullable=False),
    sqlite_strict=True,
)

bases = sa.Table(
    "bases",
    metadata,
    sa.Column("base_id", sa.Text, primary_key=True),  # also the digest of the blob that holds its record
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("path", sa.Text),  # on this machine; stands nowhere else
    sqlite_strict=True,
)

"""A bucket as a shared registry: S3, Google Cloud Storage or Azure through obstore, with no server beside it.

    PREFIX/blobs/sha256/HEX             a file of an adapter; written once
    PREFIX/names/NAME/versions/N.json   which files version N has; created, never replaced
    PREFIX/names/NAME/aliases/ALIAS     the number it points to; replaced only where it is still what was read

Two who publish at once get two numbers, because a version's record is put on condition that there is none; and an alias
is put on condition that its entity tag is the one that was read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flora.digests import digest_file
from flora.errors import AliasConflict, AuthError, FloraError, NotFound, RemoteError, UsageError
from flora.names import Digest, Reference, parse_reference
from flora.registry.remotes.remote import Interrupted, Listing, Outgoing, RemoteFile

_KIND = "flora.bucket.version"
_SCHEMA_VERSION = 1
_ATTEMPTS = 20  # to get a number, or to move `latest`, against others who do the same


class _File(msgspec.Struct, frozen=True):
    sha256: str
    size: int


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    files: dict[str, _File]
    message: str
    kind: str = _KIND
    schema_version: int = _SCHEMA_VERSION


class _Pointer(msgspec.Struct, frozen=True):
    version: int


@dataclass(frozen=True, slots=True)
class _Read:
    """An object's bytes, and the tag that they had."""

    data: bytes
    e_tag: str | None


class Bucket:
    """One name in a bucket: `s3://bucket/prefix/name[:alias|@vN]`."""

    def __init__(self, address: str, store: Any = None) -> None:
        """store  an obstore store for PREFIX, in place of the one that the address and the environment name.

        Raises UsageError if the address names no adapter.
        """
        root, _, last = address.rpartition("/")
        self.reference = _parse(address, last)
        if not re.fullmatch(r"\w+://[^/]+(/.*)?", root):
            raise UsageError(f"{address} names a bucket and no adapter in it", fix=f"write {address}/NAME")
        self.address = address
        self._root = root
        self._opened = store

    @property
    def _store(self) -> Any:
        if self._opened is None:
            import obstore.store

            self._opened = obstore.store.from_url(self._root)
        return self._opened

    # Reading

    def look(self, revision: str | None = None) -> Listing:
        number = self._number(parse_reference(f"{self.reference.name}@{revision}") if revision else self.reference)
        found = self._get(self._version_key(number))
        if found is None:
            raise NotFound(f"{self._root} has no {self.reference.name}@v{number}", fix="give another version or alias")
        files = [
            RemoteFile(name, file.size, sha256=file.sha256, key=_blob_key(file.sha256))
            for name, file in sorted(self._decode(found.data).files.items())
        ]
        return Listing(f"v{number}", tuple(files))

    def read(self, listing: Listing, file: RemoteFile, offset: int, timeout_s: float) -> Iterator[bytes]:
        import obstore
        import obstore.exceptions

        try:
            result = obstore.get(self._store, file.key, options={"range": {"offset": offset}})
            for piece in result.stream(min_chunk_size=1 << 20):
                yield bytes(piece)
        except obstore.exceptions.BaseError as error:
            translated = self._error(error)
            raise Interrupted(str(error)) if isinstance(translated, RemoteError) else translated from error

    def versions(self) -> list[int]:
        """Every version's number, ascending."""
        import obstore
        import obstore.exceptions

        prefix = f"names/{self.reference.name}/versions/"
        try:
            keys = [meta["path"] for page in obstore.list(self._store, prefix) for meta in page]
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error
        matches = (re.fullmatch(r"(\d+)\.json", key.rpartition("/")[2]) for key in keys)
        return sorted(int(match[1]) for match in matches if match)

    def pointed(self, alias: str) -> tuple[int, str | None] | None:
        """The version that the alias points to, and the tag to move it by; None if there is no such alias."""
        found = self._get(self._alias_key(alias))
        return (self._pointer(found.data), found.e_tag) if found else None

    # Writing

    def publish(self, outgoing: Outgoing) -> str:
        """Uploads what the bucket lacks, makes the next version, and moves `latest` (or the address's alias) to it.

        Files that are there already are not sent again, so a broken push goes on where it stopped; a version equal to
        the newest one is that one. Raises AuthError, RemoteError, AliasConflict (the address's alias moved meanwhile).
        """
        if self.reference.version is not None or self.reference.digest is not None:
            raise UsageError(f"{self.address} is a version; a push makes a new one", fix="give the bare name")
        alias = self.reference.alias
        before = self.pointed(alias) if alias else None
        files = {name: _describe(outgoing.folder / name) for name in outgoing.names}
        for name, file in files.items():
            self._create(_blob_key(file.sha256), outgoing.folder / name)
        record = msgspec.json.encode(_Record(files=files, message=outgoing.message))
        number = self._add_version(files, record)
        if alias:
            self.move(alias, number, expected=before[1] if before else None)
        else:
            self._advance_latest(number)
        return f"{self._root}/{self.reference.name}@v{number}"

    def move(self, alias: str, number: int, *, expected: str | None) -> None:
        """Points the alias to that version, if its tag is still `expected` (None: it does not exist yet).

        Raises AliasConflict.
        """
        mode: Any = "create" if expected is None else {"e_tag": expected}
        if not self._put(self._alias_key(alias), msgspec.json.encode(_Pointer(number)), mode):
            raise AliasConflict(
                f"{self._root}/{self.reference.name}:{alias} moved since it was read",
                cause="someone else published to it at the same moment",
                fix="look where it points, then push again if that is still right",
            )

    def _add_version(self, files: dict[str, _File], record: bytes) -> int:
        for _ in range(_ATTEMPTS):
            number = max(self.versions(), default=0)
            newest = self._get(self._version_key(number)) if number else None
            if newest is not None and self._decode(newest.data).files == files:
                return number
            if self._put(self._version_key(number + 1), record, "create"):
                return number + 1
        raise RemoteError(f"others kept taking the next version of {self.address}", fix="push again")

    def _advance_latest(self, number: int) -> None:
        """Moves `latest` to `number`, unless someone has moved it further."""
        for _ in range(_ATTEMPTS):
            before = self.pointed("latest")
            if before is not None and before[0] >= number:
                return
            try:
                self.move("latest", number, expected=before[1] if before else None)
                return
            except AliasConflict:
                continue
        raise RemoteError(f"others kept moving latest of {self.address}", fix="push again")

    # Keys and requests

    def _number(self, reference: Reference) -> int:
        if reference.version is not None:
            return reference.version
        for alias in (reference.alias,) if reference.alias else ("prod", "latest"):
            if pointed := self.pointed(alias):
                return pointed[0]
        raise NotFound(f"there is no {reference} in {self._root}", fix="check the name, the alias and the bucket")

    def _version_key(self, number: int) -> str:
        return f"names/{self.reference.name}/versions/{number}.json"

    def _alias_key(self, alias: str) -> str:
        return f"names/{self.reference.name}/aliases/{alias}"

    def _get(self, key: str) -> _Read | None:
        import obstore
        import obstore.exceptions

        try:
            result = obstore.get(self._store, key)
            return _Read(bytes(result.bytes()), result.meta["e_tag"])
        except (obstore.exceptions.NotFoundError, FileNotFoundError):
            return None
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error

    def _put(self, key: str, data: bytes | Path, mode: Any) -> bool:
        """Whether the condition held, and the object is written."""
        import obstore
        import obstore.exceptions

        try:
            obstore.put(self._store, key, data, mode=mode, use_multipart=False)
        except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError, FileExistsError):
            return False
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error
        return True

    def _create(self, key: str, path: Path) -> None:
        """Uploads a blob unless it is there. Large ones go in parts: obstore makes the object whole or not at all."""
        import obstore
        import obstore.exceptions

        try:
            if obstore.head(self._store, key)["size"] == path.stat().st_size:
                return
        except (obstore.exceptions.NotFoundError, FileNotFoundError):
            pass
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error
        try:
            obstore.put(self._store, key, path)
        except obstore.exceptions.BaseError as error:
            raise self._error(error) from error

    def _decode(self, data: bytes) -> _Record:
        try:
            record = msgspec.json.decode(data, type=_Record)
        except msgspec.DecodeError as error:
            raise RemoteError(f"a record of {self.address} cannot be read", cause=str(error)[:300]) from error
        for file in record.files.values():
            Digest(f"sha256:{file.sha256}")  # before it becomes part of a key
        if record.kind != _KIND or record.schema_version > _SCHEMA_VERSION:
            raise RemoteError(
                f"{self.address} was written in a way that this Flora does not know",
                fix="upgrade Flora: pip install -U flora-adapters",
            )
        return record

    def _pointer(self, data: bytes) -> int:
        try:
            return msgspec.json.decode(data, type=_Pointer).version
        except msgspec.DecodeError as error:
            raise RemoteError(f"an alias of {self.address} cannot be read", cause=str(error)[:300]) from error

    def _error(self, error: Exception) -> FloraError:
        """obstore's error in our words."""
        import obstore.exceptions as kinds

        text = " ".join(str(error).split())[:400]
        if isinstance(error, (kinds.PermissionDeniedError, kinds.UnauthenticatedError)):
            fix = "set the credentials of the bucket, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return AuthError(f"{self.address} is refused to these credentials", cause=text, fix=fix)
        if isinstance(error, kinds.NotFoundError):
            return NotFound(f"{self.address} is not there", cause=text, fix="check the bucket's name")
        return RemoteError(f"{self.address} cannot be used", cause=text, fix="try again; it is safe to repeat")


def _parse(address: str, last: str) -> Reference:
    reference = parse_reference(last)
    if reference.digest is not None:
        raise UsageError(f"{address}: a bucket knows versions and aliases", fix="write NAME@vN or NAME:ALIAS")
    return reference


def _blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256}"


def _describe(path: Path) -> _File:
    return _File(digest_file(path).hex, path.stat().st_size)

"""A blob is checked when it is read as a file, once for as long as the file stays as it was."""

import os

import pytest
from blake3 import blake3

from flora.errors import StoreError
from flora.names import Digest
from flora.registry.store import BlobStore


def test_a_file_that_changed_since_it_was_checked_is_checked_again(tmp_path):
    store = BlobStore(tmp_path)
    digest = Digest(store.put([b"0123456789"]).digest)
    (span,) = store.verified(digest)
    path = span.path

    os.chmod(path, 0o600)
    path.write_bytes(b"012345678X")  # the same length
    os.utime(path, ns=(1, 1))

    with pytest.raises(StoreError):
        store.verified(digest)


def test_a_file_that_stayed_as_it_was_is_not_read_again(tmp_path, monkeypatch):
    store = BlobStore(tmp_path)
    digest = Digest(store.put([b"0123456789"]).digest)
    store.verified(digest)
    monkeypatch.setattr("flora.registry.verified.hashlib.sha256", lambda: pytest.fail("it was hashed again"))

    store.verified(digest)
    with pytest.raises(pytest.fail.Exception):
        BlobStore(tmp_path).verified(digest)  # another store has not checked it


def test_a_file_is_checked_while_it_is_read_and_what_was_made_of_a_damaged_one_does_not_count(tmp_path):
    store = BlobStore(tmp_path)
    digest = Digest(store.put([b"0123456789"]).digest)

    (span,) = store.spans(digest)
    path = span.path
    with store.verified_beside(digest):
        assert path.read_bytes() == b"0123456789"

    os.chmod(path, 0o600)
    path.write_bytes(b"012345678X")
    with pytest.raises(StoreError, match="damaged"), store.verified_beside(digest):
        path.read_bytes()  # as good as any, until the context ends


def test_damage_is_the_error_whatever_it_made_the_reader_stumble_over(tmp_path):
    store = BlobStore(tmp_path)
    digest = Digest(store.put([b"0123456789"]).digest)
    (span,) = store.verified(digest)
    path = span.path
    os.chmod(path, 0o600)
    path.write_bytes(b"")

    with pytest.raises(StoreError) as caught, store.verified_beside(digest):
        raise ValueError("the header is cut off")
    assert isinstance(caught.value.__context__, ValueError)

    path.unlink()
    with pytest.raises(StoreError), store.verified_beside(digest):
        path.read_bytes()


def test_what_is_checked_is_what_is_read_though_the_file_is_replaced_meanwhile(tmp_path):
    store = BlobStore(tmp_path)
    digest = Digest(store.put([b"0123456789"]).digest)
    (span,) = store.spans(digest)
    other = tmp_path / "other"
    other.write_bytes(b"something else")

    with store.verified_beside(digest) as (mapped, check):
        other.replace(span.path)
        assert b"".join(mapped.pieces) == b"0123456789"

    assert check.result() == blake3(b"0123456789").hexdigest()
    with pytest.raises(StoreError, match="damaged"), store.verified_beside(digest):
        pass  # another file by now: what was checked of the one before does not count

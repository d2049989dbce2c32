"""Blobs by their sha256."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from flora.errors import StoreError
from flora.names import Digest
from flora.registry.parts import Span
from flora.registry.store import BlobStore
from flora.registry.unfinished import Leftover

DATA = b"an adapter's bytes"
DIGEST = Digest("sha256:" + hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path)


def stored_at(root: Path) -> Path:
    return root / "blobs" / "sha256" / DIGEST.hex[:2] / DIGEST.hex


def test_a_blob_is_named_by_its_sha256(store, tmp_path):
    blob = store.put([DATA[:5], memoryview(DATA)[5:]])

    assert (blob.digest, blob.size) == (str(DIGEST), len(DATA))
    assert stored_at(tmp_path).read_bytes() == DATA
    assert store.read(DIGEST) == DATA
    assert store.verified(DIGEST) == (Span(stored_at(tmp_path), 0, len(DATA)),)
    assert store.size(DIGEST) == len(DATA)
    assert [(file.digest, file.size) for file in store.files()] == [(DIGEST, len(DATA))]
    assert store.leftovers() == []


def test_writing_a_blob_twice_is_writing_it_once(store):
    assert store.put([DATA]) == store.put([DATA])
    assert len(list(store.files())) == 1


def test_a_blob_cannot_be_written_to_by_accident(store, tmp_path):
    store.put([DATA])

    assert stored_at(tmp_path).stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("damaged", [b"", DATA[:-1], DATA + b"x", b"A" + DATA[1:]])
def test_a_damaged_blob_is_never_given_out_and_healed_by_writing_it_again(store, tmp_path, damaged):
    store.put([DATA])
    stored_at(tmp_path).chmod(0o644)
    stored_at(tmp_path).write_bytes(damaged)

    for read in (store.read, store.verified):
        with pytest.raises(StoreError, match="is damaged") as refused:
            read(DIGEST)
        assert refused.value.digest == str(DIGEST)
    store.put([DATA])
    assert store.read(DIGEST) == DATA


def test_a_missing_blob_is_an_error_with_a_fix(store):
    for read in (store.read, store.verified):
        with pytest.raises(StoreError, match="is missing") as refused:
            read(DIGEST)
        assert "fsck" in refused.value.fix
    assert store.size(DIGEST) is None
    store.delete(DIGEST)


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize(
    ("number", "cause"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "input/output"), (errno.EROFS, "read-only")]
)
def test_a_failing_disk_is_an_error_with_cause_and_fix_and_leaves_nothing(
    store, tmp_path, monkeypatch, call, number, cause
):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match="cannot be written") as refused:
            store.put([DATA])

    assert cause in refused.value.cause
    assert refused.value.fix
    assert refused.value.errno == number
    assert store.leftovers() == []
    store.put([DATA])
    assert store.read(DIGEST) == DATA


def test_a_source_that_fails_leaves_nothing(store):
    def pieces():
        yield DATA
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        store.put(pieces())
    assert store.leftovers() == []
    assert list(store.files()) == []


def test_a_write_in_progress_is_no_leftover_and_a_dead_one_is(store, tmp_path):
    seen = []

    def pieces():
        yield DATA
        seen.append((len(list((tmp_path / "tmp").iterdir())), store.leftovers(take=True)))

    store.put(pieces())
    assert seen == [(1, [])]

    (tmp_path / "tmp" / "0123").write_bytes(b"half a blob")
    assert [leftover.name for leftover in store.leftovers()] == ["0123"]
    assert store.leftovers(older_than_s=3600) == []
    assert store.leftovers(take=True) == [Leftover("0123", 11)]
    assert store.leftovers() == []


def test_bytes_reach_the_disk_before_their_name_does(store, monkeypatch):
    """fsync of the file, rename, fsync of the folder: in this order."""
    calls = []

    def watch(name):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **kwargs: (calls.append(name), real(*args, **kwargs))[1])

    store.put([b"makes the folder tmp"])
    for name in ("fsync", "replace"):
        watch(name)
    store.put([DATA])

    assert calls[0] == "fsync"
    assert calls[-2:] == ["replace", "fsync"]


def test_one_file_makes_paths_of_digests():
    package = Path(__file__).parents[2] / "flora" / "registry"

    joining = [
        path.name for path in package.rglob("*.py") if ".hex[:2]" in path.read_text() or '/ "blobs"' in path.read_text()
    ]
    assert joining == ["store.py"]

"""Buckets as remotes: through obstore against moto's S3 server, and against obstore's own store in memory."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import MemoryStore

from flora.errors import AliasConflict, FloraError, NameInvalid, NotFound, UsageError
from flora.registry.remotes.address import open_remote
from flora.registry.remotes.bucket import Bucket
from flora.registry.remotes.pulling import pull
from flora.registry.remotes.pushing import plan_push, push
from flora.registry.remotes.remote import Outgoing
from flora.registry.remotes.transfer import Limits
from tests.registry.adapters import random_adapter

USUAL = Limits(num_attempts=2, first_wait_s=0.01)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with the bucket `models`."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
    values = ("test", "test", "us-east-1", url, "true")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(zip(names, values, strict=True))
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="models")
    yield url
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(params=["memory", "s3"])
def bucket(request, tmp_path) -> Callable[[str], Bucket]:
    """Opens one bucket's names; the last part of an address in, a remote out."""
    if request.param == "memory":
        store = MemoryStore()
        return lambda last: Bucket(f"s3://models/x/{last}", store)
    request.getfixturevalue("s3")
    return lambda last: Bucket(f"s3://models/{tmp_path.name}/{last}")


def folder(tmp_path, **files: bytes) -> Outgoing:
    place = tmp_path / "-".join(files) / str(sum(map(hash, files.values())))
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return Outgoing(place, tuple(sorted(files)), "a message", frozenset())


def content(remote: Bucket, name: str, offset: int = 0) -> bytes:
    listing = remote.look()
    file = listing.file(name)
    assert file is not None
    return b"".join(remote.read(listing, file, offset, 5))


def test_what_is_pushed_to_s3_comes_back_with_its_digests(registry, s3, tmp_path):
    pushed = registry.add(random_adapter(), "sql")
    address = f"s3://models/{tmp_path.name}/sql"

    where = push(plan_push(random_adapter(), pushed, address))
    pulled = pull(address, tmp_path / "staging", limits=USUAL)

    assert where == f"{address}@v1"
    assert pulled.revision == "v1"
    assert registry.add(pulled.adapter, "sql") == pushed


def test_versions_are_numbered_and_latest_is_the_newest(bucket, tmp_path):
    for data in (b"one", b"two"):
        bucket("sql").publish(folder(tmp_path, weights=data))

    assert bucket("sql").versions() == [1, 2]
    assert content(bucket("sql"), "weights") == b"two"
    assert content(bucket("sql@v1"), "weights") == b"one"
    assert bucket("sql").look("v1").revision == "v1"


def test_pushing_the_same_again_makes_no_version(bucket, tmp_path):
    first = bucket("sql").publish(folder(tmp_path, weights=b"one"))

    assert bucket("sql").publish(folder(tmp_path, weights=b"one")) == first
    assert bucket("sql").versions() == [1]


def test_reading_starts_at_any_byte(bucket, tmp_path):
    bucket("sql").publish(folder(tmp_path, weights=b"0123456789"))

    assert content(bucket("sql"), "weights", offset=7) == b"789"


def test_an_alias_is_what_a_bare_name_means_when_it_is_prod(bucket, tmp_path):
    bucket("sql:prod").publish(folder(tmp_path, weights=b"one"))
    bucket("sql").publish(folder(tmp_path, weights=b"two"))

    assert bucket("sql").look().revision == "v1"
    assert bucket("sql:latest").look().revision == "v2"


def test_an_alias_moves_only_from_where_it_was_read(bucket, tmp_path):
    bucket("sql:prod").publish(folder(tmp_path, weights=b"one"))
    bucket("sql").publish(folder(tmp_path, weights=b"two"))
    _, tag = bucket("sql").pointed("prod")

    bucket("sql").move("prod", 2, expected=tag)

    with pytest.raises(AliasConflict):
        bucket("sql").move("prod", 1, expected=tag)
    with pytest.raises(AliasConflict):
        bucket("sql").move("prod", 1, expected=None)
    assert bucket("sql").pointed("prod")[0] == 2


def test_many_who_publish_at_once_lose_nothing(bucket, tmp_path):
    folders = [folder(tmp_path, weights=b"%d" % i) for i in range(8)]
    start = threading.Barrier(len(folders))

    def publish(outgoing: Outgoing) -> str:
        start.wait()
        return bucket("sql").publish(outgoing)

    with ThreadPoolExecutor(len(folders)) as threads:
        addresses = list(threads.map(publish, folders))

    assert sorted(int(address.rpartition("@v")[2]) for address in addresses) == list(range(1, 9))
    assert {content(bucket(f"sql@v{n}"), "weights") for n in range(1, 9)} == {b"%d" % i for i in range(8)}
    assert bucket("sql").pointed("latest")[0] == 8


def test_what_is_there_is_not_sent_again(bucket, tmp_path, monkeypatch):
    import obstore

    bucket("sql").publish(folder(tmp_path, weights=b"same", card=b"one"))
    sent: list[str] = []
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, key, *a, **k: sent.append(key) or put(store, key, *a, **k))

    bucket("sql").publish(folder(tmp_path, weights=b"same", card=b"two"))

    assert len([key for key in sent if key.startswith("blobs/")]) == 1


def test_what_is_not_there_is_not_found(bucket):
    for last in ("sql", "sql:prod", "sql@v3"):
        with pytest.raises(NotFound):
            bucket(last).look()


@pytest.mark.parametrize("record", [b"", b"[]", b'{"files":{"w":{"sha256":"../../x","size":1}},"message":""}'])
def test_a_record_that_is_none_is_an_error_of_ours(record):
    import obstore

    store = MemoryStore()
    obstore.put(store, "names/sql/versions/1.json", record)
    obstore.put(store, "names/sql/aliases/latest", b'{"version":1}')

    with pytest.raises(FloraError) as refused:
        Bucket("s3://models/sql", store).look()
    assert refused.value.code in ("FL-REMOTE", "FL-NAME")


def test_a_missing_bucket_is_an_error_of_ours(s3):
    with pytest.raises(NotFound):
        open_remote("s3://nobody/sql").look()


@pytest.mark.parametrize("address", ["s3://sql", "s3://models/", "s3://models/a@sha256:" + "0" * 64])
def test_an_address_without_an_adapter_is_refused(address):
    with pytest.raises((UsageError, NameInvalid)):
        open_remote(address)

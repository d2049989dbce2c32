"""OCI registries as remotes: oras' real client against a registry on this machine."""

import json
from collections.abc import Iterator

import pytest

from flora.errors import AuthError, NotFound, RemoteError, UsageError
from flora.registry.remotes.address import open_remote
from flora.registry.remotes.pulling import pull
from flora.registry.remotes.pushing import plan_push, push
from flora.registry.remotes.transfer import Limits
from tests.registry.adapters import random_adapter
from tests.registry.oci_server import Oci, serve_oci

USUAL = Limits(num_attempts=2, first_wait_s=0.01)


@pytest.fixture
def oci(tmp_path, monkeypatch) -> Iterator[Oci]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))  # not this machine's credentials
    with serve_oci() as oci:
        yield oci


@pytest.fixture
def pushed(registry, oci):
    """The version that lies at `oci://…/loras/sql`."""
    version = registry.add(random_adapter(), "sql")
    push(plan_push(random_adapter(), version, f"oci://{oci.host}/loras/sql"))
    return version


def test_what_is_pushed_comes_back_with_its_digests(registry, oci, pushed, tmp_path):
    pulled = pull(f"oci://{oci.host}/loras/sql", tmp_path / "staging", limits=USUAL)

    assert registry.add(pulled.adapter, "sql") == pushed


def test_the_manifest_is_a_modelpack(oci, pushed):
    manifest = json.loads(oci.manifests["latest"])

    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert kinds == {
        "README.md": "application/vnd.cncf.model.doc.v1.raw",
        "adapter_config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "adapter_model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
        "flora.json": "application/vnd.cncf.model.weight.config.v1.raw",
    }


def test_a_tag_and_a_digest_name_one_state(registry, oci, pushed, tmp_path):
    first = open_remote(f"oci://{oci.host}/loras/sql").look().revision
    other = registry.add(random_adapter(1), "sql")
    push(plan_push(random_adapter(1), other, f"oci://{oci.host}/loras/sql:v2"))
    push(plan_push(random_adapter(1), other, f"oci://{oci.host}/loras/sql"))

    by_digest = pull(f"oci://{oci.host}/loras/sql@{first}", tmp_path / "a", limits=USUAL)
    by_tag = pull(f"oci://{oci.host}/loras/sql:v2", tmp_path / "b", limits=USUAL)

    assert registry.add(by_digest.adapter, "sql") == pushed
    assert registry.add(by_tag.adapter, "sql") == other


def test_what_the_registry_has_is_not_sent_again(registry, oci, pushed):
    sent = len(oci.uploads)

    push(plan_push(random_adapter(), pushed, f"oci://{oci.host}/loras/sql:again"))

    again = oci.uploads[sent:]
    weights = json.loads(oci.manifests["again"])["layers"][2]["digest"]
    assert weights not in again


def test_a_broken_blob_is_gone_on_with(oci, pushed, tmp_path):
    config = next(
        layer["size"]
        for layer in json.loads(oci.manifests["latest"])["layers"]
        if "adapter_config" in layer["annotations"]["org.cncf.model.filepath"]
    )
    oci.truncate = [config - 100]

    pull(f"oci://{oci.host}/loras/sql", tmp_path / "staging", limits=USUAL)

    assert oci.offsets[:2] == [0, config - 100]


def test_a_damaged_blob_is_refused(oci, pushed, tmp_path):
    digest = json.loads(oci.manifests["latest"])["layers"][2]["digest"]
    oci.blobs[digest] = oci.blobs[digest][:-1] + b"\xff"

    with pytest.raises(RemoteError, match="not what it says it is"):
        pull(f"oci://{oci.host}/loras/sql", tmp_path / "staging", limits=USUAL)


def test_a_manifest_of_another_digest_is_refused(oci, pushed):
    digest = next(key for key in oci.manifests if key.startswith("sha256:"))
    oci.manifests[digest] += b" "

    with pytest.raises(RemoteError, match="does not have that digest"):
        open_remote(f"oci://{oci.host}/loras/sql@{digest}").look()


def test_what_is_not_there_and_what_is_locked_are_told_apart(oci):
    with pytest.raises(NotFound):
        open_remote(f"oci://{oci.host}/loras/none").look()
    oci.is_locked = True
    with pytest.raises(AuthError, match="refused") as refused:
        open_remote(f"oci://{oci.host}/loras/none").look()
    assert "docker login" in refused.value.fix


@pytest.mark.parametrize(
    "address", ["oci://", "oci://host", "oci://host/UPPER", "oci://host/a@sha256:12", "oci://h/../x"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UsageError):
        open_remote(address)

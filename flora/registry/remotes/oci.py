"""An OCI registry, as Docker and Harbor speak it, through oras: one manifest per version, with ModelPack's media types.

    config   vnd.cncf.model.config.v1+json        what it is
    layers   vnd.cncf.model.weight.v1.raw         adapter_model.safetensors, as it is: uncompressed
             vnd.cncf.model.weight.config.v1.raw  adapter_config.json, flora.json, templates
             vnd.cncf.model.doc.v1.raw            README.md

Source: modelpack/model-spec. Blobs are addressed by sha256, so what a registry has is not sent again.
"""

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from flora.digests import digest_bytes, digest_file
from flora.errors import AuthError, FloraError, NameInvalid, NotFound, RemoteError, UsageError
from flora.names import Digest
from flora.registry.formats.peft import CARD_FILE
from flora.registry.formats.peft_weights import WEIGHTS_FILE
from flora.registry.remotes.remote import Interrupted, Listing, Outgoing, RemoteFile

_TYPE = "application/vnd.cncf.model."
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_FILE = "org.cncf.model.filepath"
_ADDRESS = re.compile(
    r"oci://(?P<host>[\w.\-]+(?::\d+)?)/(?P<path>[a-z0-9]+(?:[._\-/][a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.\-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_MAX_MANIFEST_BYTES = 4 << 20
_TIMEOUT_S = 30.0


class _Descriptor(msgspec.Struct, frozen=True):
    digest: str
    size: int
    mediaType: str = ""  # OCI's spelling
    annotations: dict[str, str] = {}


class _Manifest(msgspec.Struct, frozen=True):
    layers: list[_Descriptor]


class OciRepository:
    """One repository: `oci://host/path/name[:tag|@sha256:…]`. Plain HTTP for this machine alone."""

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise UsageError(
                f"{address[:120]!r} is no address of an OCI registry",
                fix="write oci://host/path/name, in lower case, with :tag or @sha256:… if need be",
            )
        self.address = address
        self._host, self._path = match["host"], match["path"]
        self._tag, self._digest = match["tag"], match["digest"]

    def look(self, revision: str | None = None) -> Listing:
        data = self._manifest(revision or self._digest or self._tag or "latest")
        digest = str(digest_bytes(data))
        try:
            manifest = msgspec.json.decode(data, type=_Manifest)
            files = [
                RemoteFile(layer.annotations[_FILE], layer.size, sha256=Digest(layer.digest).hex, key=layer.digest)
                for layer in manifest.layers
                if _FILE in layer.annotations
            ]
        except (msgspec.DecodeError, NameInvalid) as error:
            raise RemoteError(f"the manifest of {self.address} is no ModelPack", cause=str(error)[:300]) from error
        return Listing(digest, tuple(files))

    def read(self, listing: Listing, file: RemoteFile, offset: int, timeout_s: float) -> Iterator[bytes]:
        registry = self._registry(timeout_s)
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._translated(is_passing=True):
            url = f"{registry.prefix}://{self._host}/v2/{self._path}/blobs/{file.key}"
            response = registry.do_request(url, "GET", headers=headers | {"Accept-Encoding": "identity"}, stream=True)
            self._check(response)
            skip = offset if response.status_code == 200 else 0
            for piece in response.raw.stream(1 << 20, decode_content=False):
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                yield piece[skip:]
                skip = 0

    def publish(self, outgoing: Outgoing) -> str:
        """Sends the blobs that the registry lacks, then the manifest under the address's tag, or `latest`."""
        if self._digest:
            raise UsageError(f"{self.address} is a digest; a push makes a new one", fix="give a tag, or none")
        registry = self._registry(_TIMEOUT_S)
        tag = self._tag or "latest"
        with self._translated(), tempfile.TemporaryDirectory(prefix="flora-oci-") as temporary:
            container = registry.get_container(f"{self._host}/{self._path}:{tag}")
            config = Path(temporary) / "config.json"
            config.write_text(json.dumps({"descriptor": {"name": self._path.rpartition("/")[2]}, "config": {}}))
            layers = [_layer(outgoing.folder / name) for name in sorted(outgoing.names)]
            for name, layer in zip(sorted(outgoing.names), layers, strict=True):
                self._check(registry.upload_blob(str(outgoing.folder / name), container, layer))
            self._check(registry.upload_blob(str(config), container, _config_of(config)))
            manifest = {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "artifactType": f"{_TYPE}manifest.v1+json",
                "config": _config_of(config),
                "layers": layers,
                "annotations": {"org.opencontainers.image.description": outgoing.message},
            }
            self._check(registry.upload_manifest(manifest, container))
        return f"oci://{self._host}/{self._path}:{tag}"

    def _manifest(self, reference: str) -> bytes:
        """The manifest's bytes; of a digest, only those that have it."""
        registry = self._registry(_TIMEOUT_S)
        with self._translated():
            url = f"{registry.prefix}://{self._host}/v2/{self._path}/manifests/{reference}"
            response = registry.do_request(url, "GET", headers={"Accept": _MANIFEST}, stream=True)
            self._check(response)
            data = response.raw.read(_MAX_MANIFEST_BYTES + 1, decode_content=True)
        if len(data) > _MAX_MANIFEST_BYTES:
            raise RemoteError(f"the manifest of {self.address} has more than {_MAX_MANIFEST_BYTES >> 20} MiB")
        if reference.startswith("sha256:") and hashlib.sha256(data).hexdigest() != reference.removeprefix("sha256:"):
            raise RemoteError(
                f"the manifest of {self.address} does not have that digest", fix="do not trust this registry"
            )
        return bytes(data)

    def _registry(self, timeout_s: float) -> Any:
        """oras' client of this host, which logs in as Docker's configuration says."""
        from oras.provider import Registry
        from requests.adapters import HTTPAdapter

        class Timed(HTTPAdapter):  # oras sets no time limit
            def send(self, request: Any, *args: Any, **options: Any) -> Any:
                return super().send(request, *args, **options | {"timeout": options.get("timeout") or timeout_s})

        is_local = self._host.partition(":")[0] in ("localhost", "127.0.0.1")
        registry = Registry(hostname=self._host, insecure=is_local)
        once = getattr(Registry.do_request, "__wrapped__", None)
        if once is not None:  # oras repeats a refusal for two minutes; what may be repeated, `transfer.py` repeats
            registry.do_request = functools.partial(once, registry)
        for scheme in ("http://", "https://"):
            registry.session.mount(scheme, Timed())
        registry.auth.load_configs(registry.get_container(f"{self._host}/{self._path}"))
        return registry

    def _check(self, response: Any) -> None:
        status = response.status_code
        if status in (401, 403):
            raise self._denied(f"status {status}")
        if status == 404:
            raise NotFound(f"there is no {self.address}", fix="check the host, the path and the tag")
        if status in (408, 429, 500, 502, 503, 504):
            after = response.headers.get("Retry-After", "")
            raise Interrupted(f"status {status}", retry_after_s=float(after) if after.isdigit() else None)
        if status >= 400:
            raise RemoteError(f"{self.address} is refused ({status})", cause=str(response.text)[:300])

    def _denied(self, cause: str) -> AuthError:
        fix = f"log in to the registry: docker login {self._host}"
        return AuthError(f"{self.address} is refused to these credentials", cause=cause, fix=fix)

    @contextmanager
    def _translated(self, *, is_passing: bool = False) -> Iterator[None]:
        """Errors of oras and its HTTP library in our words; with `is_passing` a broken connection is Interrupted."""
        import requests
        import urllib3

        try:
            yield
        except Interrupted as error:
            if is_passing:
                raise
            raise RemoteError(f"{self.address} is busy", cause=str(error), fix="try again later") from error
        except FloraError:
            raise
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if is_passing:
                raise Interrupted(f"{type(error).__name__}: {error}") from error
            raise RemoteError(f"{self.address} cannot be reached", cause=str(error)[:300], fix="try again") from error
        except ValueError as error:  # oras: no way to log in, an upload that failed
            if "authentication" in str(error):
                raise self._denied(str(error)) from error
            raise RemoteError(f"{self.address} cannot be used", cause=str(error)[:300], fix="try again") from error


def _layer(path: Path) -> dict[str, Any]:
    kind = {WEIGHTS_FILE: "weight.v1.raw", CARD_FILE: "doc.v1.raw"}.get(path.name, "weight.config.v1.raw")
    return {
        "mediaType": _TYPE + kind,
        "digest": str(digest_file(path)),
        "size": path.stat().st_size,
        "annotations": {_FILE: path.name},
    }


def _config_of(path: Path) -> dict[str, Any]:
    return {"mediaType": f"{_TYPE}config.v1+json", "digest": str(digest_file(path)), "size": path.stat().st_size}

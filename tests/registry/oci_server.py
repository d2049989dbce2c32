"""An OCI registry for one machine: the distribution specification's pull and push, as oras asks for them."""

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Oci:
    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)  # by tag and by digest
    uploads: list[str] = field(default_factory=list)  # digests that were sent
    truncate: list[int] = field(default_factory=list)  # where the next blobs end too early
    offsets: list[int] = field(default_factory=list)
    is_locked: bool = False


class _Handler(BaseHTTPRequestHandler):
    oci: Oci
    protocol_version = "HTTP/1.1"

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        if self.oci.is_locked:
            return self._answer(401, b"{}")
        match = re.fullmatch(r"/v2/([a-z0-9/._\-]+?)/(blobs|manifests)/(uploads/?[\w\-]*|[\w.:\-]+)", url.path)
        if match is None:
            return self._answer(404, b"{}")
        _, kind, what = match.groups()
        if kind == "manifests":
            return self._manifest(what, body)
        if what.startswith("uploads"):
            return self._upload(url.query, body, match[1])
        return self._blob(what)

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _manifest(self, reference: str, body: bytes) -> None:
        if self.command == "PUT":
            manifest = json.loads(body)
            needed = [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
            if any(digest not in self.oci.blobs for digest in needed):
                return self._answer(400, b'{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}')
            self.oci.manifests[reference] = self.oci.manifests[_digest(body)] = body
            return self._answer(201, b"")
        if reference not in self.oci.manifests:
            return self._answer(404, b"{}")
        return self._answer(200, self.oci.manifests[reference], {"Content-Type": self.headers["Accept"]})

    def _upload(self, query: str, body: bytes, name: str) -> None:
        if self.command == "POST":
            return self._answer(202, b"", {"Location": f"/v2/{name}/blobs/uploads/{uuid.uuid4()}"})
        digest = parse_qs(query)["digest"][0]
        if _digest(body) != digest:
            return self._answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
        self.oci.blobs[digest] = body
        self.oci.uploads.append(digest)
        return self._answer(201, b"")

    def _blob(self, digest: str) -> None:
        if digest not in self.oci.blobs:
            return self._answer(404, b"{}")
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        offset = int(match[1]) if match else 0
        if self.command == "GET":
            self.oci.offsets.append(offset)
        return self._answer(206 if match else 200, self.oci.blobs[digest][offset:], is_blob=True)

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, *, is_blob: bool = False
    ) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if is_blob and self.command == "GET" and self.oci.truncate:
            data = data[: self.oci.truncate.pop(0)]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@contextmanager
def serve_oci() -> Iterator[Oci]:
    oci = Oci()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"oci": oci}))
    oci.host = f"127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield oci
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

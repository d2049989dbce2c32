"""A Hugging Face Hub for one machine: the endpoints that pushing and pulling a model use, over real HTTP.

It keeps repositories in memory, checks tokens, verifies the sha256 of every LFS object that is uploaded to it, and
refuses a commit whose parent is not the newest. What it answers follows the requests of huggingface_hub's client.
"""

import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

TOKEN = "hf_" + "t" * 34


@dataclass(frozen=True)
class InXet:
    """A file whose bytes went to Xet storage: the Hub is told its sha256 and size in the commit."""

    sha256: str
    size: int


@dataclass
class Repo:
    is_private: bool = False
    files: dict[str, Any] = field(default_factory=dict)  # bytes, or InXet
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit, branch or tag
    is_gated: bool = False

    def keep(self, files: dict[str, bytes]) -> str:
        """Makes `files` the newest commit, as a push from elsewhere would; returns it."""
        self.files = dict(files)
        self.commits.append(hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest())
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that `revision` means, and its files."""
        self.snapshots[self.commits[-1]] = dict(self.files)
        commit = self.commits[-1] if revision == "main" else revision
        return (commit, self.snapshots[commit]) if commit in self.snapshots else None


@dataclass
class Hub:
    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    xet: str = ""  # where this Hub's Xet storage is; to hf_xet a folder is local://FOLDER
    requests: list[tuple[str, str]] = field(default_factory=list)
    before_commit: Callable[[Repo], None] = lambda repo: None  # what someone else does meanwhile
    broken: dict[str, int] = field(default_factory=dict)  # status to answer with, by a pattern in the path
    busy: dict[str, int] = field(default_factory=dict)  # how often to answer 429 first, by a pattern in the path
    truncate: list[int] = field(default_factory=list)  # where the next bodies of files end too early, in bytes
    corrupt: int = 0  # how many of the next files come with a byte changed
    before_file: Callable[[Repo], None] = lambda repo: None
    pause_s: float = 0.0  # between the bytes of a file
    elsewhere: str = ""  # where files are redirected to
    tokens_seen: list[str | None] = field(default_factory=list)  # with each file request
    offsets: list[int] = field(default_factory=list)  # where file requests began
    ended: Event = field(default_factory=Event)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method != "GET" else b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self._chunks())
        self.hub.requests.append((method, path))
        for part, status in self.hub.broken.items():
            if re.search(part, path):
                return self._answer(status, {"error": "broken on purpose"})
        for part, left in self.hub.busy.items():
            if left and re.search(part, path):
                self.hub.busy[part] -= 1
                return self._answer(429, {"error": "slow down"}, {"Retry-After": "0"})
        if not path.startswith(("/lfs/", "/cdn/")) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        for pattern, handle in _ROUTES:
            if method == pattern[0] and (match := re.fullmatch(pattern[1], path)):
                return handle(self, body, **match.groupdict())
        return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
        if repo_id in self.hub.repos:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo_id}"}
            )
        is_private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(is_private)
        return self._answer(200, {"url": f"{self.hub.address}/{repo_id}"})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if self.hub.repos[repo].is_gated:
            return self._answer(403, {"error": "Access to this model is restricted"}, {"X-Error-Code": "GatedRepo"})
        found = self.hub.repos[repo].at(revision)
        if found is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        siblings = [self._sibling(name, data) for name, data in sorted(files.items())]
        return self._answer(200, {"id": repo, "sha": commit, "siblings": siblings, "tags": []})

    def _sibling(self, name: str, data: bytes | InXet) -> dict[str, Any]:
        if "blobs=" not in self.path:
            return {"rfilename": name}
        if isinstance(data, InXet):
            lfs = {"sha256": data.sha256, "size": data.size, "pointerSize": 135}
            return {"rfilename": name, "size": data.size, "blobId": "0" * 40, "lfs": lfs}
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 135}
        return sibling

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        self.hub.tokens_seen.append(self.headers.get("Authorization"))
        self.hub.before_file(self.hub.repos[repo])
        found = self.hub.repos[repo].at(revision)
        if found is None or name not in found[1]:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if self.hub.elsewhere:
            location = f"{self.hub.elsewhere}/cdn/{repo}/{found[0]}/{name}"
            return self._answer(302, {}, {"Location": location})
        return self.cdn(body, repo, revision, name)

    def cdn(self, body: bytes, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        if self.path.startswith("/cdn/"):
            hub.tokens_seen.append(self.headers.get("Authorization"))
        found = hub.repos[repo].at(revision)
        assert found is not None
        data = found[1][name]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        offset = int(match[1]) if match else 0
        hub.offsets.append(offset)
        if hub.corrupt:
            hub.corrupt -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        data = data[offset:]
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if hub.truncate:
            data = data[: hub.truncate.pop(0)]
            self.close_connection = True
        if not hub.pause_s:
            self.wfile.write(data)
            return
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # whoever is kept waiting goes away: that is what is tested
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                if hub.ended.wait(hub.pause_s):
                    return

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return self._answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        return self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def xet_token(self, body: bytes, repo: str) -> None:
        self._answer(200, {"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": self.hub.xet})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "another sha256"})
        self.hub.objects[oid] = body
        return self._answer(200, {})

    def commit(self, body: bytes, repo: str) -> None:
        target = self.hub.repos[repo]
        self.hub.before_commit(target)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, target.commits[-1]):
            return self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                target.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                target.files[value["path"]] = InXet(value["oid"], value["size"]) if stored is None else stored
            elif line["key"] == "deletedFile":
                del target.files[value["path"]]
            else:
                return self._answer(400, {"error": f"unknown operation {line['key']}"})
        target.messages.append(header["summary"])
        target.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.hub.address}/{repo}/commit/{target.commits[-1]}"
        return self._answer(200, {"commitUrl": url, "commitOid": target.commits[-1], "success": True})

    def log_message(self, *_: object) -> None:
        pass


_REPO = r"(?P<repo>[\w.\-]+/[\w.\-]+)"
_ROUTES = [
    (("POST", "/api/repos/create"), _Handler.create),
    (("POST", "/api/validate-yaml"), _Handler.validate_yaml),
    (("GET", f"/api/models/{_REPO}"), _Handler.info),
    (("GET", f"/api/models/{_REPO}/revision/(?P<revision>[\\w.\\-]+)"), _Handler.info),
    (("GET", f"/{_REPO}/resolve/(?P<revision>[\\w.\\-]+)/(?P<name>[\\w.\\-]+)"), _Handler.resolve),
    (("GET", f"/cdn/{_REPO}/(?P<revision>[\\w.\\-]+)/(?P<name>[\\w.\\-]+)"), _Handler.cdn),
    (("POST", f"/api/models/{_REPO}/preupload/main"), _Handler.preupload),
    (("GET", f"/api/models/{_REPO}/xet-write-token/main"), _Handler.xet_token),
    (("POST", f"/{_REPO}\\.git/info/lfs/objects/batch"), _Handler.batch),
    (("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"), _Handler.upload),
    (("POST", f"/api/models/{_REPO}/commit/main"), _Handler.commit),
]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()

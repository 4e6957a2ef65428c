"""A hub to upload to, on loopback: what huggingface_hub's client asks of the real one, kept in memory.

Not Xet: tests switch it off, and the client then speaks the LFS protocol.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".png", ".pt", ".pkl")
Answer = tuple[int, Any]


@dataclass
class StoredFile:
    """A file of a repository."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What tells whether it has changed."""
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Repository:
    """Its branches, each the files by path."""

    private: bool = False
    branches: dict[str, dict[str, StoredFile]] = field(default_factory=lambda: {"main": {}})


@dataclass
class HubServer:
    """One hub; a context manager. Accounts: ada, who may write, and her organisation lab, where she may read."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    collections: dict[str, list[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """of LFS, by sha256"""
    received: list[int] = field(default_factory=list)
    """sizes of the LFS files that arrived whole"""
    commits: list[list[str]] = field(default_factory=list)
    """the paths that each commit changed"""
    requests: list[str] = field(default_factory=list)
    cut_above: int | None = None
    """uploads of files of more bytes are cut in the middle; None: none is"""
    failures: int = 0
    """answers with 503 that are still to come"""

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return {path: file.content for path, file in self.repositories[repository].branches[branch].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        """An LFS file."""
        hub, size = self.server_hub, int(self.headers["Content-Length"])
        if hub.cut_above is not None and size > hub.cut_above:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(size)
        hub.objects[hashlib.sha256(content).hexdigest()] = content
        hub.received.append(size)
        self._answer(200, {})

    def _serve(self) -> None:
        hub, path = self.server_hub, unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if hub.failures:
            hub.failures -= 1
            return self._answer(503, {"error": "busy"})
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *match.groups())
        self._answer(404, {"error": f"no such call: {self.command} {path}"})

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _role(self) -> str | None:
        return {"Bearer hf_write": "write", "Bearer hf_read": "read"}.get(self.headers.get("Authorization", ""))

    def _may_write(self) -> bool:
        if self._role() == "write":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _branch(self, name: str, revision: str | None) -> dict[str, StoredFile] | None:
        """The files of a branch; answers if there are none that this user may see."""
        repository = self.server_hub.repositories.get(name)
        if repository is None or (repository.private and self._role() is None):
            self._missing("RepoNotFound")
        elif revision in (None, COMMIT, *repository.branches):
            return repository.branches["main" if revision in (None, COMMIT) else str(revision)]
        else:
            self._missing("RevisionNotFound")
        return None

    def whoami(self, body: bytes) -> None:
        if self._role() is None:
            return self._answer(401, {"error": "Invalid username or password."})
        lab = {"type": "org", "name": "lab", "roleInOrg": "read"}
        self._answer(
            200, {"type": "user", "name": "ada", "orgs": [lab], "auth": {"accessToken": {"role": self._role()}}}
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        if not self._may_write():
            return
        if name in self.server_hub.repositories:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.server_hub.address}/{name}"}
            )
        self.server_hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self._answer(200, {"url": f"{self.server_hub.address}/{name}"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.server_hub.repositories[name]
        if branch in repository.branches:
            return self._answer(409, {"error": "exists"})
        repository.branches[branch] = dict(repository.branches["main"])
        self._answer(200, {})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        files = self._branch(name, revision)
        if files is None:
            return
        siblings = [
            {
                "rfilename": path,
                "size": len(file.content),
                "blobId": file.blob_id,
                **(
                    {"lfs": {"size": len(file.content), "sha256": file.sha256, "pointerSize": 130}}
                    if file.is_lfs
                    else {}
                ),
            }
            for path, file in files.items()
        ]
        card = files["README.md"].content.decode() if "README.md" in files else ""
        metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
        private = self.server_hub.repositories[name].private
        self._answer(
            200, {"id": name, "sha": COMMIT, "private": private, "siblings": siblings, "cardData": metadata, "tags": []}
        )

    def tree(self, body: bytes, name: str, revision: str) -> None:
        files = self._branch(name, revision)
        if files is not None:
            self._answer(
                200,
                [{"type": "file", "path": path, "size": len(f.content), "oid": f.blob_id} for path, f in files.items()],
            )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        files = self._branch(name, revision)
        if files is None:
            return
        if path not in files:
            return self._missing("EntryNotFound")
        self._answer(200, files[path].content, ETag=f'"{files[path].oid}"', X_Repo_Commit=COMMIT)

    def validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = self._branch(name, revision) if self._may_write() else None
        if files is None:
            return
        told = [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": told})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server_hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.server_hub.address}/lfs/{entry['oid']}"}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        files = self._branch(name, revision) if self._may_write() else None
        if files is None:
            return
        changed = []
        for line in map(json.loads, body.decode().splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = StoredFile(self.server_hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            changed += [value["path"]] if "path" in value else []
        self.server_hub.commits.append(changed)
        self._answer(200, {"commitUrl": f"{self.server_hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def collect(self, body: bytes) -> None:
        slug = f"ada/{json.loads(body)['title'].replace(' ', '-')}"
        self.server_hub.collections.setdefault(slug, [])
        self._answer(200, self._collection(slug))

    def add_item(self, body: bytes, slug: str) -> None:
        self.server_hub.collections[slug].append(json.loads(body)["item"]["id"])
        self._answer(200, self._collection(slug))

    def _collection(self, slug: str) -> dict[str, Any]:
        return {
            "slug": slug, "title": slug, "owner": {"name": "ada"}, "items": [], "position": 0, "private": False,
            "lastUpdated": "2026-01-01T00:00:00.000Z", "theme": "blue", "upvotes": 0,
        }  # fmt: skip


Route = Callable[..., None]
NAME, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: list[tuple[str, Route]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (r"POST /api/collections", _Handler.collect),
    (rf"POST /api/collections/{NAME}/items", _Handler.add_item),
    (rf"POST /api/models/{NAME}/branch/{REVISION}", _Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/{REVISION}", _Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/{REVISION}", _Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"GET /api/models/{NAME}/tree/{REVISION}", _Handler.tree),
    (rf"GET /api/models/{NAME}(?:/revision/{REVISION})?", _Handler.info),
    (rf"(?:GET|HEAD) /{NAME}/resolve/{REVISION}/(.+)", _Handler.resolve),
]

"""A Hugging Face Hub on loopback: the calls that huggingface_hub's client makes, and the faults of a bad network.

Data sets are read from a folder `datasets/<owner>/<name>/`; models are kept in memory and can be uploaded. Xet is not
supported: tests switch it off, and the client then uses the LFS protocol.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml
from huggingface_hub import constants

from nanochat.data import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".parquet", ".safetensors", ".png", ".pt", ".pkl")
BLOCK_BYTES = 1 << 16


@dataclass
class StoredFile:
    """A file of a repository."""

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The id by which the client sees that a file has changed."""
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Repository:
    """The files of each branch by path."""

    private: bool = False
    branches: dict[str, dict[str, StoredFile]] = field(default_factory=lambda: {"main": {}})

    @classmethod
    def read(cls, folder: Path) -> "Repository":
        """Read the repository in `folder`."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        stored = {str(p.relative_to(folder)): StoredFile(p.read_bytes(), p.suffix in LFS_SUFFIXES) for p in paths}
        return cls(branches={"main": stored})


@dataclass
class FakeHub:
    """A context manager that serves until it exits.

    Accounts: ada may write, and is a member of the organization lab, where she may only read.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    """models by owner/name; datasets by datasets/owner/name"""
    root: Path | None = None
    """folder with datasets/; repositories are read at their first request"""
    cut: int = 0
    """close the connection in the middle of every `cut`-th download"""
    fail: int = 0
    """answer every `fail`-th download with `status`"""
    status: int = 503
    retry_after: int | None = None
    """seconds in the Retry-After header of a failure"""
    rate_limit: str = ""
    """RateLimit header of a failure"""
    surplus: bytes = b""
    """sent after the content of each download"""
    page: str = ""
    """HTML that is the answer to everything, as in a network that wants a login"""
    corrupt: str = ""
    """damage the first whole download of each file whose path contains this"""
    slow: float = 0.0
    """milliseconds to wait before each 64 KiB of a download"""
    cut_above: int | None = None
    """cut uploads of more bytes in the middle"""
    failures: int = 0
    """number of next calls that get `status`"""

    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS files by sha256"""
    received: list[int] = field(default_factory=list)
    """sizes of the LFS files that arrived whole"""
    commits: list[list[str]] = field(default_factory=list)
    """the paths that each commit changed"""
    requests: list[str] = field(default_factory=list)
    downloads: int = 0
    corrupted: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
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
        """Return the contents of a repository by path."""
        return {path: file.content for path, file in self.repositories[repository].branches[branch].items()}

    def find(self, name: str) -> Repository | None:
        """Return the repository called `name`, read from `root` if necessary."""
        with self.lock:
            if name not in self.repositories and self.root and (self.root / name).is_dir():
                self.repositories[name] = Repository.read(self.root / name)
            return self.repositories.get(name)

    def replace_the_real_one(self, monkeypatch: pytest.MonkeyPatch, first_pause: float = 0.01) -> None:
        """Make this process use this hub; downloads wait `first_pause` seconds before the first retry."""
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", first_pause)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up in the middle of a download
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        """Receive an LFS file."""
        size = int(self.headers["Content-Length"])
        if self.hub.cut_above is not None and size > self.hub.cut_above:
            self.rfile.read(size // 2)
            return self._hang_up()
        content = self.rfile.read(size)
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.hub.received.append(size)
        self._answer(200, {})

    def _serve(self) -> None:
        call = f"{self.command} {unquote(urlparse(self.path).path)}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(call)
        if self.hub.page:
            self._head(200, len(self.hub.page), Content_Type="text/html")
            self.wfile.write(self.hub.page.encode() * (self.command != "HEAD"))
            return
        if self.hub.failures:
            self.hub.failures -= 1
            return self._fail()
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, call):
                return method(self, body, **match.groupdict())
        self._answer(404, {"error": f"no such call: {call}"})

    def _answer(self, status: int, value: Any, **headers: object) -> None:
        data = json.dumps(value).encode()
        self._head(status, len(data), **headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, size: int, **headers: object) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": size, **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()

    def _fail(self) -> None:
        pause: dict[str, object] = {} if self.hub.retry_after is None else {"Retry_After": self.hub.retry_after}
        if self.hub.rate_limit:
            pause["RateLimit"] = self.hub.rate_limit
        self._answer(self.hub.status, {"error": "busy"}, **pause)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

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
        """Return the files of a branch; answer 404 and return None if this user cannot see it."""
        repository = self.hub.find(name)
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
        token = {"accessToken": {"role": self._role()}}
        self._answer(200, {"type": "user", "name": "ada", "orgs": [lab], "auth": token})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        if not self._may_write():
            return
        answer = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **answer})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self._answer(200, answer)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        branches = self.hub.repositories[name].branches
        if branch in branches:
            return self._answer(409, {"error": "exists"})
        branches[branch] = dict(branches["main"])
        self._answer(200, {})

    def info(self, body: bytes, kind: str, name: str, revision: str | None) -> None:
        key = f"datasets/{name}" if kind == "datasets" else name
        files = self._branch(key, revision)
        if files is None:
            return
        siblings: list[dict[str, Any]] = []
        for path, file in files.items():
            siblings.append({"rfilename": path, "size": len(file.content), "blobId": file.blob_id})
            if file.is_lfs:
                siblings[-1]["lfs"] = {"size": len(file.content), "sha256": file.sha256, "pointerSize": 130}
        card = files["README.md"].content.decode() if "README.md" in files else ""
        metadata = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
        private = self.hub.repositories[key].private
        about: dict[str, Any] = {"id": name, "sha": COMMIT, "private": private, "cardData": metadata, "tags": []}
        self._answer(200, {**about, "siblings": siblings})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None) -> None:
        """List the files below a folder, or for datasets, unless recursive, what is directly in it."""
        files = self._branch(f"datasets/{name}" if kind == "datasets" else name, revision)
        if files is None:
            return
        prefix = f"{folder}/" if folder else ""
        found = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not found:
            return self._missing("EntryNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            for path, file in found.items()
            if "/" not in path.removeprefix(prefix) or not self.path.endswith("recursive=false&expand=false")
        ]
        if len(entries) < len(found):
            folders = {path.removeprefix(prefix).split("/")[0] for path in found if "/" in path.removeprefix(prefix)}
            entries += [{"type": "directory", "path": prefix + name, "size": 0, "oid": COMMIT} for name in folders]
        self._answer(200, entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        """Send a file, or the rest of it from the start of the Range header, with the faults asked for."""
        hub, files = self.hub, self._branch(name, revision)
        if files is None:
            return
        if path not in files:
            return self._missing("EntryNotFound")
        file, size = files[path], len(files[path].content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if start >= size > 0:
            return self._head(416, 0, Content_Range=f"bytes */{size}")
        headers = {"ETag": f'"{file.oid}"', "X_Repo_Commit": COMMIT, "X_Linked_Size": size, "Accept_Ranges": "bytes"}
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
        if self.command == "HEAD":
            return self._head(206 if wanted else 200, size - start, **headers)
        with hub.lock:
            hub.downloads += 1
            cut, fail = (every and hub.downloads % every == 0 for every in (hub.cut, hub.fail))
            damage = bool(hub.corrupt) and hub.corrupt in path and start == 0 and path not in hub.corrupted
            if damage and not fail:
                hub.corrupted.add(path)
        if fail:
            return self._fail()
        content = bytearray(file.content[start:])
        if damage:
            content[len(content) // 2] ^= 0xFF
        content += hub.surplus
        self._head(206 if wanted else 200, len(content), **headers)
        end = len(content) // 2 if cut else len(content)
        for at in range(0, end, BLOCK_BYTES):
            time.sleep(hub.slow / 1000)
            self.wfile.write(content[at : min(at + BLOCK_BYTES, end)])
        if cut:
            self._hang_up()

    def validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = self._branch(name, revision) if self._may_write() else None
        if files is None:
            return
        modes: list[dict[str, Any]] = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = files[path].oid if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}}
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
                files[value["path"]] = StoredFile(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            changed += [value["path"]] if "path" in value else []
        self.hub.commits.append(changed)
        self._answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/{REVISION}", _Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/{REVISION}", _Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"GET /api/(?P<kind>models|datasets)/{NAME}/tree/{REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"GET /api/(?P<kind>models|datasets)/{NAME}(?:/revision/{REVISION})?", _Handler.info),
    (rf"(?:GET|HEAD) /(?P<name>(?:datasets/)?[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
]

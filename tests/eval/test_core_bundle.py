"""Fetching the bundle from a web server on loopback."""

import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from nanochat.data import download
from nanochat.errors import UserError
from nanochat.eval import core
from nanochat.eval.core import fetch_bundle, read_tasks

Serve = Callable[..., list[dict[str, str]]]
FILES = {
    "core.yaml": "icl_tasks:\n"
    "- {label: x, dataset_uri: a/x.jsonl, num_fewshot: [0], icl_task_type: language_modeling}\n",
    "eval_meta_data.csv": "Eval Task,Random baseline\nx,25\n",
    "eval_data/a/x.jsonl": '{"context": "a", "continuation": "b"}\n' * 1000,
}


def zipped(files: dict[str, str] = FILES) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"eval_bundle/{name}", text)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("core.yaml", FILES["core.yaml"].replace("a/x.jsonl", "../core.yaml")),
        ("core.yaml", FILES["core.yaml"].replace("[0]", "[1000000000]")),
        ("core.yaml", "icl_tasks: [" * 5000),
        ("eval_meta_data.csv", FILES["eval_meta_data.csv"].replace("25", "nan")),
        ("eval_data/a/x.jsonl", "[" * 100_000),
        ("eval_data/a/x.jsonl", '{"context": 7, "continuation": "b"}'),
        ("eval_data/a/x.jsonl", '{"context": "a", "continuation": "b", "gold": 9}'),
    ],
)
def test_a_malformed_bundle_gets_one_line(tmp_path: Path, name: str, text: str) -> None:
    for file, content in (FILES | {name: text}).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError):
        print([task.rows for task in read_tasks(tmp_path)])


def test_an_archive_that_unpacks_to_too_much_is_refused(serve: Serve, base_dir: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/core.yaml", "0" * 100_000_000)
    serve(packed.getvalue())
    with pytest.raises(UserError, match="100,0"):
        fetch_bundle()
    assert not (base_dir / "eval_bundle").exists()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve these bytes, the first answer cut short by `cut`; gives the headers of each GET as they come."""
    servers = []

    def start(content: bytes, cut: int = 0) -> list[dict[str, str]]:
        asked: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self, first: int) -> None:
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(content) - first))
                self.send_header("ETag", '"version-1"')
                self.end_headers()

            def do_HEAD(self) -> None:
                self.answer(0)

            def do_GET(self) -> None:
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                asked.append(dict(self.headers))
                self.answer(first)
                self.wfile.write(content[first : len(content) - (cut if len(asked) == 1 else 0)])
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(core, "URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
        return asked

    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_it_is_fetched_once_and_goes_on_where_it_was_cut(
    base_dir: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    asked = serve(zipped(), cut=500)
    folder = fetch_bundle()
    assert folder == base_dir / "eval_bundle" == fetch_bundle()
    assert [task.baseline for task in read_tasks(folder)] == [0.25]
    assert (folder / "eval_data" / "a" / "x.jsonl").read_text() == FILES["eval_data/a/x.jsonl"]
    assert [headers.get("Range") for headers in asked] == [None, f"bytes={len(zipped()) - 500}-"]
    assert "hf_secret" not in str(asked)
    assert [path.name for path in (base_dir / "data" / "eval_bundle").iterdir()] == [".lock"]


def test_a_damaged_one_is_refused_and_fetched_again(base_dir: Path, serve: Serve) -> None:
    damaged = bytearray(zipped())
    damaged[damaged.index(b'{"context"') + 50] ^= 1
    serve(bytes(damaged))
    with pytest.raises(UserError, match="damaged"):
        fetch_bundle()
    assert not (base_dir / "eval_bundle").exists()
    serve(zipped())
    assert read_tasks(fetch_bundle())


def test_a_file_that_is_no_bundle_is_refused(base_dir: Path, serve: Serve) -> None:
    serve(zipped({name: text for name, text in FILES.items() if name != "core.yaml"}))
    with pytest.raises(UserError, match="--eval-bundle"):
        fetch_bundle()
    assert not (base_dir / "eval_bundle").exists()


@pytest.mark.usefixtures("base_dir")
def test_without_a_network_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--eval-bundle"):
        fetch_bundle()

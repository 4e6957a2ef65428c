import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from nanochat.data import download
from nanochat.data.download import fetch
from nanochat.errors import UserError
from nanochat.paths import MANIFEST_FILE
from tests.conftest import StartHub

REPOSITORY = "someone/text"
NAMES = [f"shard_{i:05d}.parquet" for i in range(5)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A hub's folder with one repository of five files of 300 KB."""
    repository = tmp_path / "hub" / "datasets" / REPOSITORY
    repository.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (repository / name).write_bytes(hashlib.sha256(name.encode()).digest() * (9_000 + i))
    return tmp_path / "hub"


def assert_whole(root: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (root / "datasets" / REPOSITORY / name).read_bytes()
    assert not list(folder.glob(".*.partial"))


def test_files_and_manifest(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root)
    files = fetch(REPOSITORY, NAMES[:3], tmp_path / "data")
    assert_whole(root, tmp_path / "data", NAMES[:3])
    assert not (tmp_path / "data" / NAMES[3]).exists()
    manifest = json.loads((tmp_path / "data" / MANIFEST_FILE).read_text())
    assert manifest["repository"] == REPOSITORY and len(manifest["revision"]) == 40
    for file in files:
        assert file.sha256 == hashlib.sha256((tmp_path / "data" / file.name).read_bytes()).hexdigest()
        assert manifest["files"][file.name]["sha256"] == file.sha256


@pytest.mark.parametrize("faults", [("--cut", 2), ("--fail", 2), ("--cut", 3, "--fail", 4, "--corrupt", NAMES[1])])
def test_download_survives_network_failures(
    start_hub: StartHub, root: Path, tmp_path: Path, faults: tuple[object, ...]
) -> None:
    start_hub("--root", root, *faults)
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert_whole(root, tmp_path / "data", NAMES)


def test_retry_after_is_honored(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root, "--fail", 2, "--status", 429, "--retry-after", 1)
    start = time.monotonic()
    fetch(REPOSITORY, NAMES[:2], tmp_path / "data")
    assert time.monotonic() - start >= 1
    assert_whole(root, tmp_path / "data", NAMES[:2])


def test_the_hub_s_rate_limit_is_waited_out(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    assert download.requested_pause({"RateLimit": '"resolvers";r=0;t=240'}) > 240
    assert download.requested_pause({"RateLimit": '"resolvers";r=3;t=240'}) == 0
    start_hub("--root", root, "--fail", 2, "--status", 429, "--rate-limit", '"resolvers";r=0;t=0')
    start = time.monotonic()
    fetch(REPOSITORY, NAMES[:2], tmp_path / "data")
    assert time.monotonic() - start >= 1
    assert_whole(root, tmp_path / "data", NAMES[:2])


def test_more_bytes_than_promised_are_refused(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root, "--surplus", b"x" * 1_000_000)
    with pytest.raises(UserError, match="more than the promised"):
        fetch(REPOSITORY, NAMES[:1], tmp_path / "data")
    (partial,) = (tmp_path / "data").glob(".*.partial")
    assert partial.stat().st_size <= (root / "datasets" / REPOSITORY / NAMES[0]).stat().st_size


def test_a_network_that_wants_a_login_gets_one_line(start_hub: StartHub, tmp_path: Path) -> None:
    start_hub("--page", "<html>Log in</html>")
    with pytest.raises(UserError, match=r"HF_ENDPOINT.*login"):
        fetch(REPOSITORY, NAMES[:1], tmp_path / "data")


@pytest.mark.parametrize("damaged", [False, True])
def test_the_next_run_resumes_a_partial_file(
    start_hub: StartHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    size = (root / "datasets" / REPOSITORY / NAMES[0]).stat().st_size
    start_hub("--root", root, "--cut", 1)
    with monkeypatch.context() as context:
        context.setattr(download, "MAX_FAILURES", 0)
        with pytest.raises(UserError, match="rerun the command to resume"):
            fetch(REPOSITORY, NAMES[:1], tmp_path / "data")
    (partial,) = (tmp_path / "data").glob(".*.partial")
    half = partial.stat().st_size
    assert 0 < half < size
    if damaged:
        partial.write_bytes(b"\0" * half)
    start_hub("--root", root)
    fetched: list[int] = []
    monkeypatch.setattr(download, "resume_download", counted(fetched))
    fetch(REPOSITORY, NAMES[:1], tmp_path / "data")
    assert fetched == ([size - half, size] if damaged else [size - half])
    assert_whole(root, tmp_path / "data", NAMES[:1])


def counted(fetched: list[int]):  # type: ignore[no-untyped-def]
    real = download.resume_download

    def resume_download(url: str, size: int, path: Path, *rest: object) -> None:
        before = path.stat().st_size if path.exists() else 0
        real(url, size, path, *rest)  # type: ignore[arg-type]
        fetched.append(path.stat().st_size - before)

    return resume_download


def test_complete_files_need_no_network(
    start_hub: StartHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hub("--root", root)
    first = fetch(REPOSITORY, NAMES, tmp_path / "data")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert fetch(REPOSITORY, NAMES, tmp_path / "data") == first
    assert fetch(REPOSITORY, NAMES[:2], tmp_path / "data", verify=True) == first[:2]


def test_a_modified_file_is_downloaded_again(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root)
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    damaged = tmp_path / "data" / NAMES[2]
    times = damaged.stat().st_atime_ns, damaged.stat().st_mtime_ns
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    os.utime(damaged, ns=times)
    (tmp_path / "data" / NAMES[3]).unlink()
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert_whole(root, tmp_path / "data", NAMES)


def test_another_revision_replaces_the_files_that_changed(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root)
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    changed = root / "datasets" / REPOSITORY / NAMES[2]
    old = changed.read_bytes()
    changed.write_bytes(old[::-1])
    start_hub("--root", root)
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert (tmp_path / "data" / NAMES[2]).read_bytes() == old
    fetch(REPOSITORY, NAMES, tmp_path / "data", revision="main")
    assert_whole(root, tmp_path / "data", NAMES)


def test_copied_files_are_hashed_not_downloaded(
    start_hub: StartHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hub("--root", root)
    shutil.copytree(root / "datasets" / REPOSITORY, tmp_path / "data")
    monkeypatch.setattr(download, "resume_download", None)
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    (tmp_path / "data" / MANIFEST_FILE).write_text("{half a manif")
    fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert_whole(root, tmp_path / "data", NAMES)


def test_concurrent_runs_download_once(
    start_hub: StartHub, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = start_hub("--root", root, "--slow", 20)
    code = f"from nanochat.data.download import *; fetch({REPOSITORY!r}, {NAMES!r}, Path({str(tmp_path / 'data')!r}))"
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, env={**os.environ, "HF_ENDPOINT": address}) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert_whole(root, tmp_path / "data", NAMES)
    assert capfd.readouterr().out.count("downloading someone/text") == 1


def test_a_missing_file_is_named(start_hub: StartHub, root: Path, tmp_path: Path) -> None:
    start_hub("--root", root)
    with pytest.raises(UserError, match=r"someone/text at http://\S+ has 5 files, but no other\.parquet"):
        fetch(REPOSITORY, [NAMES[0], "other.parquet"], tmp_path / "data")
    with pytest.raises(UserError, match=r"nobody/text was not found at http.*HF_TOKEN"):
        fetch("nobody/text", NAMES, tmp_path / "none")


def test_offline_mode(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch(REPOSITORY, NAMES, tmp_path / "data")


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.001)
    with pytest.raises(UserError, match=r"cannot download someone/text from http://127\.0\.0\.1:1"):
        fetch(REPOSITORY, NAMES, tmp_path / "data")


def test_disk_space_is_checked_first(
    start_hub: StartHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hub("--root", root)
    monkeypatch.setattr(download, "DISK_RESERVE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"GB .*--num-shards"):
        fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.parquet"))


def test_one_failure_stops_the_other_files(
    start_hub: StartHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_hub("--root", root, "--slow", 100)
    real = download.resume_download

    def resume_download(url: str, *rest: object) -> None:
        if NAMES[1] in url:
            raise OSError(28, "No space left on device")
        real(url, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(download, "resume_download", resume_download)
    start = time.monotonic()
    with pytest.raises(OSError, match="No space left on device"):
        fetch(REPOSITORY, NAMES, tmp_path / "data")
    assert time.monotonic() - start < 0.4  # a whole file takes 0.5 s


def test_retries_are_limited_and_progress_resets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.0)
    calls = 0

    def ask() -> None:
        nonlocal calls
        calls += 1
        raise download.httpx2.ReadTimeout("slow")

    with pytest.raises(download.httpx2.ReadTimeout):
        download.retry(ask)
    assert calls == download.MAX_FAILURES + 1
    calls = 0
    with pytest.raises(download.httpx2.ReadTimeout):
        download.retry(ask, progress=lambda: min(calls, 20))
    assert calls == 20 + download.MAX_FAILURES


def test_stop_interrupts_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 60.0)
    stop = threading.Event()

    def ask() -> None:
        raise download.httpx2.ConnectError("refused")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(download.retry, ask, stop=stop)
        stop.set()
        with pytest.raises(CancelledError):
            waiting.result(timeout=5)

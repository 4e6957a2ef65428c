"""Download files of a dataset repository on the Hugging Face Hub, with resume, retries and sha256 verification.

huggingface_hub lists the files and their digests. The bytes are downloaded here because hf_hub_download does not resume
a partial file of an earlier process (https://github.com/huggingface/huggingface_hub/pull/4228).
"""

import contextlib
import json
import os
import random
import shutil
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers, tqdm

from nanochat.atomic import atomic_write, sha256
from nanochat.data.progress import Advance, progress_bar
from nanochat.errors import UserError, one_line
from nanochat.locks import folder_lock
from nanochat.paths import MANIFEST_FILE
from nanochat.units import format_bytes

PARALLEL_FILES = 8
MAX_DAMAGED_DOWNLOADS = 3
DISK_RESERVE_BYTES = 1 << 30
MAX_FAILURES = 6  # consecutive failed requests without a new byte; with the pauses, half a minute
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 600.0  # the hub's rate limits count requests in windows of five minutes
SHOWN_PAUSE_SECONDS = 30.0  # longer ones are announced
TEMPORARY_STATUS = (408, 425, 429, 500, 502, 503, 504)
NOT_A_HUB = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError, ssl.SSLError, httpx2.InvalidURL)
"""Errors of calls to the hub if something else answers, or if the environment's settings for connections are wrong."""
NEVER = threading.Event()

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    name: str  # path in the repository, and in the download folder
    size: int  # bytes
    sha256: str
    checked: int | None = field(default=None, compare=False)  # st_ctime_ns when verified: any later write changes it


@dataclass
class Manifest:
    """The verified files of a download folder. Every change is saved at once."""

    folder: Path
    repository: str
    revision: str | None = None  # commit of the repository
    files: dict[str, HubFile] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, repository: str) -> "Manifest":
        """Read the folder's manifest. Empty if it is missing, damaged or from another repository."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            saved = json.loads((folder / MANIFEST_FILE).read_text())
            if saved["repository"] == repository:
                files = {name: HubFile(name, **entry) for name, entry in saved["files"].items()}
                return cls(folder, repository, saved["revision"], files)
        return cls(folder, repository)

    def is_verified(self, name: str) -> bool:
        """Return True if the file has not changed since its sha256 was last verified. Does not read the file."""
        path, file = self.folder / name, self.files.get(name)
        if file is None or not path.is_file():
            return False
        return (path.stat().st_size, path.stat().st_ctime_ns) == (file.size, file.checked)

    def add(self, file: HubFile) -> None:
        """Record a file whose sha256 has just been verified."""
        self.files[file.name] = replace(file, checked=(self.folder / file.name).stat().st_ctime_ns)
        self.save()

    def save(self) -> None:
        files = {f.name: {"size": f.size, "sha256": f.sha256, "checked": f.checked} for f in self.files.values()}
        content = {"repository": self.repository, "revision": self.revision, "files": dict(sorted(files.items()))}
        with atomic_write(self.folder / MANIFEST_FILE) as out:
            out.write(json.dumps(content, indent=2) + "\n")


def fetch(
    repository: str, names: Sequence[str], folder: Path, *, verify: bool = False, disk_factor: float = 1.0,
    revision: str | None = None,
) -> list[HubFile]:  # fmt: skip
    """Download the files `names` of a dataset repository into `folder`, unless they exist. Returns them in order.

    Files that changed since their last verification (with `verify`, all files) are hashed again, and damaged ones are
    downloaded again. Needs no network if nothing is missing. A second process waits for the first. `disk_factor`: free
    disk space to require, as a multiple of the bytes to download. `revision`: default that of the files in
    `folder`, else the newest. Raises UserError if a download fails or the disk is too small, OSError if a write fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            manifest = Manifest.load(folder, repository)
            if revision not in (None, manifest.revision):
                manifest.revision, manifest.files = revision, {}  # unchanged files are hashed, not downloaded again
            pending = [name for name in names if verify or not manifest.is_verified(name)]
            if pending:
                _obtain_all(manifest, _describe(manifest, pending), disk_factor)
            return [manifest.files[name] for name in names]
    except httpx2.HTTPError as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise UserError(
                f"{repository} was not found at {constants.ENDPOINT} or is not public: check HF_ENDPOINT, or set "
                "HF_TOKEN to a token with read access"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot download {repository} from {constants.ENDPOINT} ({reason}): rerun the command to resume"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{folder} is incomplete and HF_HUB_OFFLINE is set: unset it, or copy the folder from another machine"
        ) from error


def _describe(manifest: Manifest, names: Sequence[str]) -> list[HubFile]:
    """Sizes and digests of files: from the manifest if it lists them all and none is missing, else from the hub."""
    known = manifest.files
    if all(name in known and _size(manifest.folder / name) == known[name].size for name in names):
        return [known[name] for name in names]
    listing = retry(lambda: _list_files(manifest))
    if absent := [name for name in names if name not in listing]:
        raise UserError(
            f"{manifest.repository} at {constants.ENDPOINT} has {len(listing)} files, but no {absent[0]}: lower "
            "--num-shards or check HF_ENDPOINT"
        )
    return [listing[name] for name in names]


def _list_files(manifest: Manifest) -> dict[str, HubFile]:
    """List the repository at the manifest's revision if that still exists, else at the newest."""
    try:
        info = HfApi().dataset_info(manifest.repository, revision=manifest.revision, files_metadata=True)
    except RevisionNotFoundError:  # history was rewritten; files that did not change still have their digests
        info = HfApi().dataset_info(manifest.repository, files_metadata=True)
    manifest.revision = info.sha
    # Files outside LFS are a few lines each and have no sha256.
    return {e.rfilename: HubFile(e.rfilename, e.lfs.size, e.lfs.sha256) for e in info.siblings or [] if e.lfs}


def _obtain_all(manifest: Manifest, files: Sequence[HubFile], disk_factor: float) -> None:
    """Verify or download several files at a time, with one progress bar. The first failure or Ctrl-C stops all."""
    folder, title = manifest.folder, f"verifying {manifest.repository}"
    if missing := [file for file in files if _size(folder / file.name) != file.size]:
        num_bytes = sum(max(0, file.size - _size(_partial(folder, file))) for file in missing)
        check_disk_space(
            folder, num_bytes * disk_factor, "lower --num-shards, or set NANOCHAT_BASE_DIR to a folder on a larger disk"
        )
        title = manifest.repository
        print(f"downloading {title}: {format_bytes(num_bytes)}, files: {len(missing)}", flush=True)
    stop = threading.Event()
    total = sum(file.size for file in files)
    with progress_bar(title, total, in_bytes=True) as advance, ThreadPoolExecutor(PARALLEL_FILES) as pool:
        futures = {pool.submit(_obtain, manifest, file, advance, stop): file for file in files}
        try:
            for future in as_completed(futures):
                future.result()
                manifest.add(futures[future])
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def check_disk_space(folder: Path, num_bytes: float, fix: str) -> None:
    """Raise UserError unless `folder` has room for `num_bytes` and DISK_RESERVE_BYTES."""
    needed, free = round(num_bytes) + DISK_RESERVE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {format_bytes(needed)} of free disk space and has {format_bytes(free)}: free some, {fix}"
        )


def stop_above(num_bytes: int) -> type[tqdm]:
    """Return a `tqdm_class` for huggingface_hub that raises UserError once DISK_RESERVE_BYTES more have arrived.

    huggingface_hub compares sizes only at the end, but updates its progress bar before it writes. The reserve is for
    Xet, which may transfer more than it writes.
    """

    class Limited(tqdm):
        received = 0.0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += n or 0
            if self.received > num_bytes + DISK_RESERVE_BYTES:
                raise UserError(f"{constants.ENDPOINT} sends more bytes than it lists: check HF_ENDPOINT")
            return super().update(n)

    return Limited


def _obtain(manifest: Manifest, file: HubFile, advance: Advance, stop: threading.Event) -> None:
    """Download a file until its sha256 matches, unless it exists and is intact."""
    path, partial = manifest.folder / file.name, _partial(manifest.folder, file)
    if path.is_file():
        if sha256(path) == file.sha256:
            advance(file.size)
            return
        path.unlink()
        print(f"{path} is damaged and will be downloaded again", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(
        manifest.repository, file.name, repo_type="dataset", revision=manifest.revision, endpoint=constants.ENDPOINT
    )
    advance(_size(partial))
    for _ in range(MAX_DAMAGED_DOWNLOADS):
        resume_download(url, file.size, partial, advance, stop)
        if sha256(partial) == file.sha256:
            partial.replace(path)
            return
        advance(-_size(partial))
        partial.unlink()
    raise UserError(
        f"{file.name} of {manifest.repository} arrived damaged {MAX_DAMAGED_DOWNLOADS} times: try again later, or from "
        "another network"
    )


def resume_download(
    url: str, size: int, path: Path, advance: Advance, stop: threading.Event = NEVER, with_token: bool = True
) -> None:
    """Download the missing rest of a file of `size` bytes to `path`; after temporary failures, resume.

    Only the hub may see the user's token: other servers need `with_token=False`. Raises httpx2.HTTPError, and
    CancelledError when `stop` is set; received bytes are kept.
    """

    def append_rest() -> None:
        done = _size(path)
        if done >= size:
            return
        send = {**(build_hf_headers() if with_token else {}), "Accept-Encoding": "identity"}
        send |= {"Range": f"bytes={done}-"} if done else {}
        with get_session().stream("GET", url, headers=send, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # the server ignores Range and sends the whole file
                advance(-done)
                done = 0
            with open(path, "r+b" if done else "wb") as out:
                out.seek(done)
                # Raw, since a compressed answer may grow without end; without a chunk size, since a cut connection
                # would lose up to one chunk.
                for chunk in response.iter_raw():
                    if stop.is_set():
                        raise CancelledError
                    if done + len(chunk) > size:
                        raise UserError(f"{url} sends more than the promised {size:,} bytes: check HF_ENDPOINT")
                    out.write(chunk)
                    done += len(chunk)
                    advance(len(chunk))
                out.flush()
                os.fsync(out.fileno())
        if done < size:
            raise httpx2.RemoteProtocolError(f"the connection ended after {done} of {size} bytes")

    retry(append_rest, progress=lambda: _size(path), stop=stop)


def retry(
    request: Callable[[], Result], *, progress: Callable[[], int] = lambda: 0, stop: threading.Event = NEVER
) -> Result:
    """Call `request` again after temporary failures, with doubling pauses, or longer ones if the server asks for them.

    Raises its error if that is permanent, or after MAX_FAILURES consecutive failures during which `progress()` did not
    grow, UserError if the answer is not what a hub sends, and CancelledError when `stop` is set.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return request()
        except HFValidationError:
            raise
        except NOT_A_HUB as error:
            raise UserError(
                f"cannot reach {constants.ENDPOINT} ({one_line(error)}): check HF_ENDPOINT, HF_TOKEN, SSL_CERT_FILE "
                "and the proxy variables, and open any web page in case the network wants a login"
            ) from error
        except httpx2.HTTPError as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            temporary = (
                response.status_code in TEMPORARY_STATUS if response else isinstance(error, httpx2.TransportError)
            )
            failures = 1 if progress() > before else failures + 1
            if not temporary or failures > MAX_FAILURES:
                raise
            # Random, so that files that failed together do not retry together.
            pause = FIRST_PAUSE_SECONDS * 2 ** (failures - 1) * random.uniform(0.8, 1.2)
            pause = min(max(pause, requested_pause(response.headers) if response else 0.0), MAX_PAUSE_SECONDS)
            if pause > SHOWN_PAUSE_SECONDS:
                print(f"{constants.ENDPOINT} is not available, trying again in {pause:.0f} s", flush=True)
            if stop.wait(pause):
                raise CancelledError from error


def requested_pause(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait, in Retry-After or as the hub's rate limit; 0 if it does not."""
    retry_after = headers.get("Retry-After", "")
    if retry_after.isdecimal():
        return float(retry_after)
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else 0.0  # rounded down


def _partial(folder: Path, file: HubFile) -> Path:
    """Path of the partial file, named by the digest so that any later process can resume it."""
    target = folder / file.name
    return target.with_name(f".{target.name}.{file.sha256[:16]}.partial")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

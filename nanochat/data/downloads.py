"""Files of a data set repository on the Hugging Face Hub: fetched once, checked always.

huggingface_hub knows the endpoint, the token and the digests; the bytes are fetched by nanochat.data.transfer, for
hf_hub_download starts a cut file anew in the next run (https://github.com/huggingface/huggingface_hub/pull/4228). A
partial file carries the digest of what it will be in its name, so whoever comes next goes on with it.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from nanochat.data.bars import Bar
from nanochat.data.manifest import HubFile, Manifest
from nanochat.data.transfer import Advance, StoppedError, append_rest, patiently
from nanochat.errors import UserError
from nanochat.locks import folder_lock

FILES_AT_ONCE = 8
HASH_BYTES = 1 << 20
MOST_ARRIVALS = 3
"""Times a file may arrive whole and damaged."""
DISK_RESERVE_BYTES = 1 << 30
"""Room that is left free for everything else."""


class MissingFilesError(UserError):
    """The repository does not have every file asked for."""

    def __init__(self, repository: str, missing: Sequence[str], present: Sequence[str]) -> None:
        super().__init__(
            f"{repository} at {constants.ENDPOINT} has no file {missing[0]}: check HF_ENDPOINT, or update nanochat"
        )
        self.present = present


def fetch(
    repository: str, names: Sequence[str], folder: Path, *, verify: bool = False, room: float = 1.0
) -> list[HubFile]:
    """Bring `names` of a data set repository into `folder`; what is there and whole is not fetched again.

    A file that was touched since it was last checked is hashed again, with `verify` every one, and replaced if its
    sha256 is not the hub's. Where nothing is missing, no network is needed. A second process waits for the first.
    The disk must have `room` times the bytes to come.
    Returns the files in the order of `names`. Raises UserError if the hub cannot be reached, lacks a file
    (MissingFilesError), or the disk has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            manifest = Manifest.load(folder, repository)
            _Fetch(manifest, verify, room).run(names)
            return [manifest.files[name] for name in names]
    except httpx2.HTTPError as error:
        raise UserError(_explained(repository, error)) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}): free some space, or set NANOCHAT_BASE_DIR to a "
            "folder you can write to"
        ) from error


def _explained(repository: str, error: httpx2.HTTPError) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return (
            f"{repository} is not at {constants.ENDPOINT}, or not for everyone: check HF_ENDPOINT, or set HF_TOKEN to "
            "a token that may read it"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"cannot fetch {repository} from {constants.ENDPOINT} ({reason}): run it again, it goes on where it stopped"


class _Fetch:
    """One call of `fetch`, under the folder's lock."""

    def __init__(self, manifest: Manifest, verify: bool, room: float) -> None:
        self.manifest = manifest
        self.repository = manifest.repository
        self.folder = manifest.folder
        self.verify = verify
        self.room = room
        self.stop = threading.Event()

    def run(self, names: Sequence[str]) -> None:
        known = [self.manifest.files[name] for name in names if name in self.manifest.files]
        self._check([file for file in known if self.verify or not self.manifest.is_unchanged(file.name)])
        lacking = [name for name in names if not self.manifest.is_unchanged(name)]
        if not lacking:
            return
        if constants.is_offline_mode():
            raise UserError(
                f"{self.folder} lacks {lacking[0]} and HF_HUB_OFFLINE is set: unset it, or copy that folder from "
                "a machine that has the file"
            )
        listing = patiently(self._listing)
        if missing := [name for name in lacking if name not in listing]:
            raise MissingFilesError(self.repository, missing, list(listing))
        # What lies there without being in the manifest, copied from elsewhere perhaps, may be what is asked for.
        strange = [listing[name] for name in lacking if name not in {file.name for file in known}]
        self._check([file for file in strange if _size(self.folder / file.name) == file.size])
        self._download([listing[name] for name in lacking if not self.manifest.is_unchanged(name)])

    def _listing(self) -> dict[str, HubFile]:
        """The files of the repository, at the revision of those that are here already if it still exists."""
        try:
            info = HfApi().dataset_info(self.repository, revision=self.manifest.revision, files_metadata=True)
        except RevisionNotFoundError:  # history was rewritten; a file that did not change still has its digest
            info = HfApi().dataset_info(self.repository, files_metadata=True)
        self.manifest.revision = info.sha
        return {
            entry.rfilename: HubFile(entry.rfilename, entry.lfs.size, entry.lfs.sha256)
            for entry in info.siblings or []
            if entry.lfs  # files outside LFS are a few lines each, and have no sha256
        }

    def _check(self, files: Sequence[HubFile]) -> None:
        """Hash those of the files that are there, and note in the manifest which are whole."""

        def check(file: HubFile, advance: Advance) -> None:
            path = self.folder / file.name
            if _sha256(path, advance, self.stop) == file.sha256:
                self.manifest.add(file)
            else:
                self.manifest.forget(file.name)
                print(f"{path} is damaged: it will be fetched again", flush=True)

        present = [file for file in files if (self.folder / file.name).is_file()]
        self._in_threads(f"checking {_count(present)}", present, check)

    def _download(self, files: Sequence[HubFile]) -> None:
        needed = sum(file.size - min(file.size, _size(self._partial(file))) for file in files)
        free = shutil.disk_usage(self.folder).free
        wanted = round(needed * self.room) + DISK_RESERVE_BYTES
        if files and wanted > free:
            raise UserError(
                f"{_gigabytes(wanted)} are needed and {_gigabytes(free)} are free in {self.folder}: make room, ask "
                "for less (--num-shards), or set NANOCHAT_BASE_DIR to a folder on a larger disk"
            )

        def download(file: HubFile, advance: Advance) -> None:
            self._download_one(file, advance)
            self.manifest.add(file)

        if files:
            print(f"fetching {_count(files)} of {self.repository}, {_gigabytes(needed)}", flush=True)
        self._in_threads(self.repository, files, download)

    def _partial(self, file: HubFile) -> Path:
        target = self.folder / file.name
        return target.with_name(f".{target.name}.{file.sha256[:16]}.partial")

    def _download_one(self, file: HubFile, advance: Advance) -> None:
        """Fetch until the digest is right, and only then put the file where it is looked for."""
        target, partial = self.folder / file.name, self._partial(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(
            self.repository,
            file.name,
            repo_type="dataset",
            revision=self.manifest.revision,
            endpoint=constants.ENDPOINT,
        )
        advance(_size(partial))
        for _ in range(MOST_ARRIVALS):
            patiently(
                lambda: append_rest(url, file.size, partial, advance, self.stop),
                gained=lambda: _size(partial),
                stop=self.stop,
            )
            if _sha256(partial, lambda count: None, self.stop) == file.sha256:
                partial.replace(target)
                return
            advance(-_size(partial))
            partial.unlink()
        raise UserError(
            f"{file.name} of {self.repository} arrived damaged {MOST_ARRIVALS} times: try again later, or from "
            "another network"
        )

    def _in_threads(self, title: str, files: Sequence[HubFile], work: Callable[[HubFile, Advance], None]) -> None:
        """Several files at once, under one bar of bytes. The first failure, and Ctrl-C, stop all of them."""
        if not files:
            return
        total = sum(file.size for file in files)
        with Bar(title, total, in_bytes=True) as bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            futures = [pool.submit(work, file, bar.advance) for file in files]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path, advance: Advance, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_BYTES):
            if stop.is_set():
                raise StoppedError
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _count(files: Sequence[HubFile]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

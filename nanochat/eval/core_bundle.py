"""The evaluation bundle that nanochat's seed uses, fetched once.

It is one zip file at an address that publishes no digest, so what can be checked is what zip itself offers: the size
that the server named, and the CRC-32 of each file as it is unpacked. Results are kept with a hash of the bundle
(core_tasks.fingerprint), so that those of two different ones are never taken for each other.
"""

import hashlib
import shutil
import threading
import zipfile
import zlib
from pathlib import Path

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from nanochat import paths
from nanochat.data.bars import Bar
from nanochat.data.transfer import append_rest, patiently
from nanochat.errors import UserError
from nanochat.eval.core_tasks import read_tasks
from nanochat.locks import folder_lock

ADDRESS = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
INSIDE = "eval_bundle"
"""The one folder in the zip file."""
UNPACKED_PER_BYTE = 4
"""Room to have for each byte that is fetched: zip file and text together."""


def fetch_bundle() -> Path:
    """The bundle's folder in the base directory; fetched where it is missing.

    A cut download goes on where it stopped, also in the next run; the folder appears whole or not at all, and a second
    process waits for the first. Raises UserError if it cannot be had.
    """
    folder = paths.eval_bundle_dir()
    if folder.exists():
        return folder
    downloads = paths.data_dir(INSIDE)
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with folder_lock(downloads):
            if not folder.exists():
                _unpack(_download(downloads), folder)
    except httpx2.HTTPError as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot fetch {ADDRESS} ({reason}): run it again later, {_OTHERWISE}") from error
    except OSError as error:
        raise UserError(f"cannot write to {downloads} ({error.strerror or error}): free some space") from error
    return folder


_OTHERWISE = "or name a folder that has the bundle with --eval-bundle, or leave CORE out with --tasks chat"


def _download(downloads: Path) -> Path:
    if constants.is_offline_mode():
        raise UserError(f"the tasks of CORE are not here and HF_HUB_OFFLINE is set: unset it, {_OTHERWISE}")
    print(f"fetching the tasks of CORE from {ADDRESS}", flush=True)
    size, version = patiently(_ask)
    archive = downloads / f".{version}.partial"  # of another version of the file, nothing is used
    have = archive.stat().st_size if archive.exists() else 0
    if shutil.disk_usage(downloads).free < (size - have) * UNPACKED_PER_BYTE:
        raise UserError(f"the tasks of CORE need {size * UNPACKED_PER_BYTE / 1e9:.1f} GB in {downloads}: make room")
    with Bar("the tasks of CORE", size, in_bytes=True) as bar:
        bar.advance(have)
        patiently(
            lambda: append_rest(ADDRESS, size, archive, bar.advance, threading.Event(), headers={}),
            gained=lambda: archive.stat().st_size if archive.exists() else 0,
        )
    return archive


def _ask() -> tuple[int, str]:
    """The file's size, and a name for the version of it that the server has now."""
    response = get_session().head(ADDRESS, headers={"Accept-Encoding": "identity"})
    hf_raise_for_status(response)
    size = int(response.headers["Content-Length"])
    version = f"{size} {response.headers.get('ETag', '')}"
    return size, hashlib.sha256(version.encode()).hexdigest()[:16]


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack beside `folder` and move it there once every CRC has proved right and the tasks can be read."""
    unpacked = archive.with_suffix(".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(unpacked)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise UserError(f"{ADDRESS} arrived damaged ({error}): run it again") from error
    read_tasks(unpacked / INSIDE)
    (unpacked / INSIDE).rename(folder)
    shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()

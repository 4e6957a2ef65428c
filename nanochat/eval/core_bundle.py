"""Download the evaluation bundle of CORE, the one that karpathy/nanochat uses.

Its address publishes no digest, so the checks are the size from the server and the CRC-32 of each file in the zip.
Cached results carry a hash of the bundle (nanochat.eval.core.fingerprint), so results of different bundles never mix.
"""

import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from nanochat import paths
from nanochat.data.download import resume_download, retry
from nanochat.data.progress import progress_bar
from nanochat.errors import UserError
from nanochat.eval.core import read_tasks
from nanochat.locks import folder_lock

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
FOLDER_IN_ZIP = "eval_bundle"
ALTERNATIVES = "pass --eval-bundle FOLDER if you have the bundle, or --tasks chat to skip CORE"


def fetch_bundle() -> Path:
    """Download the bundle if it is missing; return its folder in the base directory.

    An interrupted download resumes, also in the next run, and concurrent processes wait for each other. Raises
    UserError if the bundle cannot be downloaded.
    """
    folder = paths.base_dir() / FOLDER_IN_ZIP
    if folder.exists():
        return folder
    downloads = paths.data_dir(FOLDER_IN_ZIP)
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with folder_lock(downloads):
            if not folder.exists():
                _unpack(_download(downloads), folder)
    except httpx2.HTTPError as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot download {URL} ({reason}): try again later, or {ALTERNATIVES}") from error
    except OSError as error:
        raise UserError(f"cannot write to {downloads} ({error.strerror or error}): free some space") from error
    return folder


def _download(downloads: Path) -> Path:
    if constants.is_offline_mode():
        raise UserError(f"the CORE bundle is missing and HF_HUB_OFFLINE is set: unset it, or {ALTERNATIVES}")
    print(f"downloading the CORE bundle from {URL}", flush=True)

    def head() -> httpx2.Response:
        response = get_session().head(URL, headers={"Accept-Encoding": "identity"})
        hf_raise_for_status(response)
        return response

    response = retry(head)
    size = int(response.headers["Content-Length"])
    version = hashlib.sha256(f"{size} {response.headers.get('ETag', '')}".encode()).hexdigest()[:16]
    archive = downloads / f".{version}.partial"  # a partial download of another version is not continued
    with progress_bar("CORE bundle", size, in_bytes=True) as advance:
        advance(archive.stat().st_size if archive.exists() else 0)
        resume_download(URL, size, archive, advance, with_token=False)
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack to a temporary folder, check the CRCs and the tasks, then move it to `folder`."""
    unpacked = archive.with_suffix(".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(unpacked)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise UserError(f"the download of {URL} is damaged ({error}): run it again") from error
    read_tasks(unpacked / FOLDER_IN_ZIP)
    (unpacked / FOLDER_IN_ZIP).rename(folder)
    shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()

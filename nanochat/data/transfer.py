"""One file over HTTP from a hub that may fail: asked for again with growing pauses, and from where it stopped."""

import os
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

MOST_FAILURES = 6
"""Requests in a row that may fail without a byte gained; with their pauses half a minute."""
FIRST_PAUSE_SECONDS = 1.0
MOST_PAUSE_SECONDS = 60.0
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)

Result = TypeVar("Result")
Advance = Callable[[int], None]


class StoppedError(Exception):
    """Another part of the work failed, or the user pressed Ctrl-C."""


def patiently(
    ask: Callable[[], Result], *, gained: Callable[[], int] = lambda: 0, stop: threading.Event | None = None
) -> Result:
    """`ask()`, again as long as what it raises may pass or `gained()` grows, after pauses that double.

    Raises what `ask` raises if that will not pass, or not soon.
    """
    stop = stop or threading.Event()
    failures = 0
    while True:
        before = gained()
        try:
            return ask()
        except httpx2.HTTPError as error:
            if not _may_pass(error):
                raise
            failures = 1 if gained() > before else failures + 1
            if failures > MOST_FAILURES:
                raise
            # A little at random, so that files that failed together do not come back together.
            pause = FIRST_PAUSE_SECONDS * 2 ** (failures - 1) * random.uniform(0.8, 1.2)
            if stop.wait(min(max(pause, _asked_pause(error)), MOST_PAUSE_SECONDS)):
                raise StoppedError from error


def _may_pass(error: httpx2.HTTPError) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUS
    return isinstance(error, httpx2.TransportError)


def _asked_pause(error: httpx2.HTTPError) -> float:
    """Seconds that the server asks to wait, 0 if it does not say."""
    header = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(header) if header.isdecimal() else 0.0


def append_rest(
    url: str,
    size: int,
    partial: Path,
    advance: Advance,
    stop: threading.Event,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Ask for the bytes that `partial` lacks of a file of `size` bytes; `advance` hears of every change in its size.

    `headers`: by default the hub's, with the user's token; other servers must not see it.
    Raises httpx2.HTTPError if the connection fails or ends early, and StoppedError; what has come is kept.
    """
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        return
    asked = {**(build_hf_headers() if headers is None else headers), "Accept-Encoding": "identity"}
    if have:
        asked["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the server sends the whole file, whatever was asked for
            advance(-have)
            have = 0
        with open(partial, "r+b" if have else "wb") as out:
            out.seek(have)
            for chunk in response.iter_bytes():  # as it comes: what iter_bytes collects to a size is lost with a cut
                if stop.is_set():
                    raise StoppedError
                out.write(chunk)
                have += len(chunk)
                advance(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    if have < size:
        raise httpx2.RemoteProtocolError(f"the connection ended after {have} of {size} bytes")

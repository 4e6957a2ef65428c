"""Converts Markdown to HTML in a process of its own, which is killed when a text takes too long.

Threads cannot be killed, and would compete with the event loop for the GIL.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from nanochat.serve.markdown import MAX_MARKDOWN, to_html, to_plain_html

REQUEST_SECONDS = 5.0  # for all texts of a request; the rest stays plain
TEXT_SECONDS = 2.0
START_SECONDS = 30.0
MAX_HTML_BYTES = 2**25
PROJECT = Path(__file__).parents[2]


class Renderer:
    """A process that converts one text at a time. It starts when it is first needed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()  # FIFO: the texts of concurrent requests take turns

    async def start(self) -> None:
        async with self._lock:
            await self._running()

    async def render(self, texts: list[str]) -> list[str]:
        """Convert texts to HTML. Texts that take too long stay plain text."""
        seconds = REQUEST_SECONDS
        converted = []
        for text in texts:
            async with self._lock:
                start = time.monotonic()
                limit = min(seconds, TEXT_SECONDS)
                html = await self._convert(text, limit) if limit > 0 and len(text) <= MAX_MARKDOWN else None
                seconds -= time.monotonic() - start
            converted.append(to_plain_html(text) if html is None else html)
        return converted

    async def _convert(self, text: str, seconds: float) -> str | None:
        """Return the HTML, or None if it takes longer than `seconds`, not counting the start of the process."""
        html = None
        try:
            stdin, stdout = await self._running()
            stdin.write(json.dumps(text).encode() + b"\n")
            html = str(json.loads(await asyncio.wait_for(stdout.readline(), seconds)))
        except (OSError, TimeoutError, ValueError):
            pass
        finally:
            if html is None:  # or cancelled: the process would send its answer to the next request
                await self.close()
        return html

    async def _running(self) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
        """Return the pipes of the process, starting it if necessary. Raises OSError or TimeoutError."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nanochat.serve.renderer"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_HTML_BYTES,
                cwd=PROJECT,
                start_new_session=True,  # Ctrl-C stops the server, which then closes the pipe
            )
            assert self._process.stdout
            await asyncio.wait_for(self._process.stdout.readline(), START_SECONDS)
        assert self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout

    async def close(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def main() -> None:
    """Convert each line of stdin, a JSON string, to a line of stdout."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(to_html(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

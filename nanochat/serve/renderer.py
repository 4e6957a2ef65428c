"""Convert Markdown to HTML in a separate process, which ends when a text takes too much CPU time.

A thread could not be stopped, and would compete with the event loop for the GIL.
"""

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

from nanochat.serve.markdown import to_html, to_plain_html

CPU_SECONDS = 1.0
MAX_SECONDS = 30.0  # with the start of the process, on a busy machine
MAX_HTML_BYTES = 2**25
PROJECT = Path(__file__).parents[2]


class Renderer:
    """A process that converts one text at a time. It starts when it is first needed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()  # FIFO: the texts of concurrent requests take turns

    async def render(self, texts: list[str]) -> list[str]:
        """Convert texts to HTML. One that takes longer than CPU_SECONDS stays plain, and so do those after it."""
        html: list[str] = []
        for text in texts:
            async with self._lock:
                line = await self._convert(json.dumps(text).encode() + b"\n")
            if not line:
                return html + [to_plain_html(text) for text in texts[len(html) :]]
            html.append(json.loads(line))
        return html

    async def _convert(self, line: bytes) -> bytes:
        """Send a line to the process and return its answer, which is empty if the process ended or hangs."""
        answer = b""
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(MAX_SECONDS):
                    stdin, stdout = await self._pipes()
                    stdin.write(line)
                    answer = await stdout.readline()
        finally:
            if not answer:  # or cancelled: the process would send its answer to the next request
                await self.close()
        return answer

    async def _pipes(self) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nanochat.serve.renderer", str(CPU_SECONDS)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_HTML_BYTES,
                cwd=PROJECT,
                start_new_session=True,  # Ctrl-C stops the server, which then closes the pipe
            )
        assert self._process.stdin and self._process.stdout
        return self._process.stdin, self._process.stdout

    async def close(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def main() -> None:
    """Convert each line of stdin, a JSON string, to a line of stdout."""
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # SIGPROF ends the process
        print(json.dumps(to_html(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

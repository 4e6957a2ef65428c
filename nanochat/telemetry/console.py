"""What a run says: on its terminal for as long as there is one, and in its log file always."""

import contextlib
import io
import os
import stat
import sys
import time
from pathlib import Path
from typing import TextIO

LOG_FILE = "log.txt"
"""In a model's folder, beside its checkpoints."""


class LogFile:
    """log.txt: the lines that a run says, each with its time. A full disk costs lines, not the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def say(self, text: str) -> None:
        """Append a line."""
        with contextlib.suppress(OSError):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def take_over(self, descriptor: int) -> None:
        """Let what is written to `descriptor` go to this file from now on."""
        os.dup2(self._file.fileno(), descriptor)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class Terminal(io.TextIOBase):
    """Standard output that may go away.

    Whoever closes a terminal, or the reader of a pipe, leaves a run that writes to nowhere: the first line would end
    it. Instead, what goes to standard output, and to standard error where that was the same, goes to the log then.
    And whoever stops to read without a word, as a connection does that is lost, would hold the run up for ever once
    a terminal's 8 kB or a pipe's 64 are full: what does not fit there is dropped, for the log has it.
    """

    def __init__(self, log: LogFile) -> None:
        self.gone = False
        self._log = log
        self._stream: TextIO = sys.stdout
        self._stream.flush()
        self._without_waiting = opened_without_waiting(self._stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in io, which no subclass can set
        """Of standard output."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return not self.gone and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write if there is still somebody to read."""
        if not self.gone:
            try:
                if self._without_waiting:
                    self._without_waiting.write(text.encode(self.encoding, "replace"))
                else:
                    self._stream.write(text)
                    self._stream.flush()
            except OSError:
                self._hang_up()
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` does."""

    def _hang_up(self) -> None:
        self.gone = True
        if self._stream is not sys.__stdout__:
            return
        same = [1, 2] if os.path.sameopenfile(1, 2) else [1]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        self._stream.flush()  # what could not be written, part of a bar perhaps, is still in its buffer
        for descriptor in same:
            self._log.take_over(descriptor)


def opened_without_waiting(stream: TextIO) -> io.FileIO | None:
    """The terminal or pipe behind a stream, so that writing takes what there is room for; None if it is neither.

    Opened anew: who shares the stream, such as a shell, would get errors if its own way to write were changed. Looking
    first (select) does not do, for a terminal waits in the middle of a text.
    """
    try:
        kind = os.fstat(stream.fileno()).st_mode
        if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
            return None
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
        return io.FileIO(os.open(f"/proc/self/fd/{stream.fileno()}", flags), "w")
    except OSError:  # another user's terminal, say, or no file at all
        return None

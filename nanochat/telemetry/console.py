"""Print a run's lines on the terminal for as long as it exists, and always to the log file."""

import contextlib
import io
import os
import stat
import sys
import time
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat.units import format_duration, printable

LOG_FILE = "log.txt"  # in a model's folder, next to its checkpoints
SECONDS_BETWEEN_LINES = 10.0  # interval of progress lines without a terminal to draw a bar on


class LogFile:
    """log.txt: the lines that a run prints, with timestamps. A full disk loses lines but does not end the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n")

    def redirect(self, descriptor: int) -> None:
        """Send what is written to the file descriptor to this file from now on."""
        os.dup2(self._file.fileno(), descriptor)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class Terminal(io.TextIOBase):
    """Standard output that may go away or stop reading, without ending or blocking the run.

    When a terminal or the reader of a pipe is closed, standard output (and standard error, if it was the same) goes to
    the log instead. When a reader stops reading without closing, as a lost connection does, text that does not fit into
    the terminal's 8 kB or the pipe's 64 kB is dropped; the log has it.
    """

    def __init__(self, log: LogFile) -> None:
        self.gone = False
        self._log = log
        self._stream: TextIO = sys.stdout
        self._stream.flush()
        self._nonblocking = open_nonblocking(self._stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in io, which a subclass may not set
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        return not self.gone and self._stream.isatty()

    def write(self, text: str) -> int:
        if not self.gone:
            try:
                if self._nonblocking:
                    self._nonblocking.write(text.encode(self.encoding, "replace"))
                else:
                    self._stream.write(text)
                    self._stream.flush()
            except OSError:
                self._hang_up()
        return len(text)

    def flush(self) -> None:
        pass  # write() flushes

    def _hang_up(self) -> None:
        self.gone = True
        if self._stream is not sys.__stdout__:
            return
        same = [1, 2] if os.path.sameopenfile(1, 2) else [1]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        self._stream.flush()  # discards buffered text, such as part of a bar
        for descriptor in same:
            self._log.redirect(descriptor)


def open_nonblocking(stream: TextIO) -> io.FileIO | None:
    """Open the terminal or pipe behind a stream for non-blocking writes; None if it is neither.

    Opened again, because O_NONBLOCK on the shared file description would cause errors in others, such as the shell.
    select() does not help: a terminal may block in the middle of a write.
    """
    try:
        kind = os.fstat(stream.fileno()).st_mode
        if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
            return None
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
        return io.FileIO(os.open(f"/proc/self/fd/{stream.fileno()}", flags), "w")
    except OSError:  # another user's terminal, or not a file
        return None


class ProgressDisplay:
    """A progress bar with loss, speed and time left on a terminal; elsewhere, and in the log, an occasional line."""

    def __init__(self, title: str, total: int, start: int, terminal: io.TextIOBase | None, log: LogFile | None) -> None:
        """Both None: print nothing (processes other than the main one)."""
        self._console = Console(file=cast(TextIO, terminal)) if terminal else None
        self._log = log
        self._title = title
        self._total = total
        self._start_time, self._start_step = time.monotonic(), start
        self._last_line = 0.0
        self._progress: Progress | None = None
        if self._console and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task(title, total=total, completed=start, figures="")
            self._progress.start()

    def update(self, step: int, figures: str) -> None:
        """Show that `step` steps are done, with `figures` such as `loss 2.31  4,200 tok/s`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = now
            seconds_left = (now - self._start_time) / max(step - self._start_step, 1) * (self._total - step)
            line = f"{self._title} {step}/{self._total}  {figures}  {format_duration(seconds_left)} left"
            if self._progress is None:
                self.show(line)
            if self._log:
                self._log.print(line)

    def print(self, text: str) -> None:
        """Print a line above the bar, and log it."""
        self.show(text)
        if self._log:
            self._log.print(text)

    def show(self, text: str) -> None:
        if self._console:
            self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

"""The Python tool: runs model-written code in an isolated interpreter.

Monty is a Python interpreter in Rust that runs in a worker process. It has no files, network or environment, and no
way out through `__class__`. The worker limits time, memory and recursion, and is killed if it exceeds the limits, so
calls work from any thread.

A call takes 0.2 ms on one x86 core, the first one 60 ms (it starts the worker).
"""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from pydantic_monty import CollectString, Monty, MontyCrashedError, MontyError, OSPolicy, ResourceLimits

from nanochat.errors import UserError

TIME_LIMIT_SECS = 0.5
MEMORY_LIMIT_BYTES = 20_000_000
MAX_RESULT_CHARS = 200
TIMED_OUT = f"error: took longer than {TIME_LIMIT_SECS} seconds"
MAX_CODE_CHARS = 10_000
MAX_EXACT_INTEGER = 2.0**53  # larger floats cannot represent every integer

LIMITS = ResourceLimits(
    max_feed_duration_secs=TIME_LIMIT_SECS,
    max_memory=MEMORY_LIMIT_BYTES,
    max_recursion_depth=200,
    max_suspensions=20,  # requests to the host, such as an unknown name; none is answered
)
# Sleeping would not count against the time limit; a fixed seed makes replies reproducible.
POLICY = OSPolicy(sleep="zero", random_start={"seed": 0})


class Calculator(AbstractContextManager["Calculator"]):
    """Evaluates Python code given as text. Thread-safe.

    Each call gets a new session without state of earlier ones. Workers start at the first call (also after `close()`)
    and stop at `close()`, at the end of a `with` block, or when the process exits.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        """`max_workers`: concurrent processes, by default one per core, at most 4. Further calls wait."""
        self._max_workers = max_workers or min(4, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._pool: Monty | None = None
        self._pool_pid = 0
        self._stop: weakref.finalize | None = None

    def run(self, expression: str) -> str:
        """Return the value of the last expression, else the printed output, as at most 200 characters.

        Numbers are rounded for people: `10 / 2` is `5`, `0.1 + 0.2` is `0.3`. An error in the code is returned as one
        line that starts with `error: `. Raises UserError if the interpreter is not installed, RuntimeError in a
        process forked after the first call.
        """
        if len(expression) > MAX_CODE_CHARS:
            return f"error: longer than {MAX_CODE_CHARS} characters"
        printed = CollectString(max_bytes=64_000)
        pool = self._started_pool()
        try:
            with pool.checkout(limits=LIMITS, os_policy=POLICY) as session:
                value = session.feed_run(expression, print_callback=printed)
            return _truncate([printed.output.strip()] if value is None else _pieces(value)) or "error: no value"
        except MontyCrashedError as crash:
            return TIMED_OUT if crash.timed_out else "error: the interpreter crashed"
        except MontyError as error:
            return _error_line(error.exception())
        except Exception as error:  # a value that cannot be sent from the worker
            return _error_line(error)

    def close(self) -> None:
        with self._lock:
            stop, self._stop, self._pool = self._stop, None, None
        if stop is not None:
            stop()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _started_pool(self) -> Monty:
        with self._lock:
            if self._pool is not None:
                if self._pool_pid != os.getpid():
                    # The threads that drive the workers do not survive a fork, so the call would hang.
                    raise RuntimeError("the calculator was started before a fork: create one in each process")
                return self._pool
            # The worker enforces the limits above; these timeouts kill a worker that does not.
            pool = Monty(
                min_processes=1,
                max_processes=self._max_workers,
                request_timeout=4 * TIME_LIMIT_SECS,
                feed_duration_limit_grace=TIME_LIMIT_SECS,
            )
            try:
                pool.__enter__()
            except FileNotFoundError:
                raise UserError("pydantic-monty is not installed: run ./setup.sh") from None
            self._pool, self._pool_pid = pool, os.getpid()
            self._stop = weakref.finalize(self, _stop_workers, pool, self._pool_pid)
            return pool


def _stop_workers(pool: Monty, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        pool.__exit__(None, None, None)


def _pieces(value: object, inside: bool = False) -> Iterator[str]:
    """Generate the text of a value piece by piece, so that a huge value costs no more than its first 200 characters."""
    if isinstance(value, bool) or value is None:
        yield str(value)
    elif isinstance(value, float):
        yield _number(value)
    elif isinstance(value, str):
        yield repr(value[: MAX_RESULT_CHARS + 1]) if inside else value
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        start, end = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        yield start
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(item, inside=True)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[item], inside=True)
        yield ("," if isinstance(value, tuple) and len(value) == 1 else "") + end
    else:
        yield str(value)


def _number(value: float) -> str:
    """repr without a trailing `.0` and without the rounding error of sums such as 0.1 + 0.2."""
    if value.is_integer() and abs(value) < MAX_EXACT_INTEGER:
        return str(int(value))
    exact, rounded = repr(value), f"{value:.15g}"
    return rounded if len(rounded) < len(exact) - 2 else exact


def _truncate(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece[: MAX_RESULT_CHARS + 1]
        if len(text) > MAX_RESULT_CHARS:
            return text[: MAX_RESULT_CHARS - 3] + "..."
    return text


def _error_line(error: BaseException) -> str:
    """One line per error. Monty's messages about limits contain measured times, so they are replaced."""
    if isinstance(error, TimeoutError):
        return TIMED_OUT
    if isinstance(error, MemoryError):
        return f"error: needs more than {MEMORY_LIMIT_BYTES // 1_000_000} MB"
    message = " ".join(str(error).split())
    return _truncate([f"error: {type(error).__name__}" + (f": {message}" if message else "")])

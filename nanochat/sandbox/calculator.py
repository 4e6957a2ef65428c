"""The python tool: runs what the model wrote in an interpreter that can reach nothing.

Monty is a Python interpreter of its own (Rust, not CPython) in a worker process: no files, no network,
no environment, no way out through `__class__`. Time, memory and recursion are limited inside the worker,
and the worker itself is killed if it does not keep to them, so nothing depends on signals or on the
thread that asks.

A warm call takes 0.2 ms on one x86 core, the first one 60 ms (the worker starts then).
"""

import os
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType

from pydantic_monty import CollectString, Monty, MontyCrashedError, MontyError, OSPolicy, ResourceLimits

from nanochat.errors import UserError

TIME_LIMIT_SECS = 0.5
MEMORY_LIMIT_BYTES = 20_000_000
MAX_RESULT_CHARS = 200
MAX_CODE_CHARS = 10_000
EXACT_INTEGERS = 2.0**53  # beyond it a float no longer tells neighbouring integers apart

LIMITS = ResourceLimits(
    max_feed_duration_secs=TIME_LIMIT_SECS,
    max_memory=MEMORY_LIMIT_BYTES,
    max_recursion_depth=200,
    max_suspensions=20,  # questions to the host, such as an unknown name; we answer none of them
)
# A sleep would count as waiting on the host and escape the time limit; a fixed seed keeps replies repeatable.
POLICY = OSPolicy(sleep="zero", random_start={"seed": 0})


class Calculator:
    """Runs Python text and gives its result back as text. Safe to share between threads.

    Every call gets a fresh session, so nothing is left over for the next one. Workers start at the
    first call and stop with `close()`, at the end of a `with` block, or when the interpreter exits;
    a call after `close()` starts them again.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        """`max_workers`: processes that may run at once, by default one a core and at most 4; calls beyond wait."""
        self._max_workers = max_workers or min(4, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._pool: Monty | None = None
        self._pool_pid = 0
        self._stop: weakref.finalize | None = None

    def run(self, expression: str) -> str:
        """The value of the last expression, else what was printed, as text of at most 200 characters.

        Numbers are written as a person would: `10 / 2` is `5`, `0.1 + 0.2` is `0.3`. Whatever is wrong with
        the text comes back as one line that starts with `error: `; it never raises for it.
        Raises UserError if the interpreter is not installed, RuntimeError in a process forked after the first call.
        """
        if len(expression) > MAX_CODE_CHARS:
            return f"error: longer than {MAX_CODE_CHARS} characters"
        printed = CollectString(max_bytes=64_000)
        pool = self._started_pool()
        try:
            with pool.checkout(limits=LIMITS, os_policy=POLICY) as session:
                value = session.feed_run(expression, print_callback=printed)
            text = _shortened(_pieces(value)) if value is not None else _shortened(iter([printed.output.strip()]))
            return text or "error: no value"
        except MontyCrashedError as crash:
            return _too_slow() if crash.timed_out else "error: the interpreter crashed"
        except MontyError as error:
            return _explained(error.exception())
        except Exception as error:  # a value that cannot leave the worker: the text's mistake, not the caller's
            return _explained(error)

    def close(self) -> None:
        """Stop the workers."""
        with self._lock:
            stop, self._stop, self._pool = self._stop, None, None
        if stop is not None:
            stop()

    def __enter__(self) -> "Calculator":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _started_pool(self) -> Monty:
        with self._lock:
            if self._pool is not None:
                if self._pool_pid != os.getpid():
                    # The threads that drive the workers do not survive a fork: the call would never return.
                    raise RuntimeError("the calculator was started before a fork: make one in each process")
                return self._pool
            # The limits above act inside the worker; the time-outs here kill one that ignores them.
            pool = Monty(
                min_processes=1,
                max_processes=self._max_workers,
                request_timeout=4 * TIME_LIMIT_SECS,
                feed_duration_limit_grace=TIME_LIMIT_SECS,
            )
            try:
                pool.__enter__()
            except FileNotFoundError:
                raise UserError("the python tool needs the package pydantic-monty: run ./setup.sh") from None
            self._pool, self._pool_pid = pool, os.getpid()
            self._stop = weakref.finalize(self, _stop_workers, pool, self._pool_pid)
            return pool


def _stop_workers(pool: Monty, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        pool.__exit__(None, None, None)


def _pieces(value: object, inside: bool = False) -> Iterator[str]:
    """The text of a value bit by bit, so that a list that contains itself a million times costs 200 characters."""
    if isinstance(value, bool) or value is None:
        yield str(value)
    elif isinstance(value, float):
        yield _number(value)
    elif isinstance(value, str):
        yield repr(value[: MAX_RESULT_CHARS + 1]) if inside else value
    elif isinstance(value, (list, tuple, set, frozenset)):
        first, last = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        yield first
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(item, inside=True)
        yield ("," if isinstance(value, tuple) and len(value) == 1 else "") + last
    elif isinstance(value, dict):
        yield "{"
        for i, (key, item) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key, inside=True)
            yield ": "
            yield from _pieces(item, inside=True)
        yield "}"
    else:
        yield str(value)


def _number(value: float) -> str:
    """Python's shortest exact text, less a trailing `.0` and the rounding noise of sums such as 0.1 + 0.2."""
    if value.is_integer() and abs(value) < EXACT_INTEGERS:
        return str(int(value))
    exact, rounded = repr(value), f"{value:.15g}"
    return rounded if len(rounded) < len(exact) - 2 else exact


def _shortened(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece[: MAX_RESULT_CHARS + 1]
        if len(text) > MAX_RESULT_CHARS:
            return text[: MAX_RESULT_CHARS - 3] + "..."
    return text


def _explained(error: BaseException) -> str:
    """One line for a mistake. Limits are worded here: Monty's text holds measured times, never twice the same."""
    if isinstance(error, TimeoutError):
        return _too_slow()
    if isinstance(error, MemoryError):
        return f"error: needs more than {MEMORY_LIMIT_BYTES // 1_000_000} MB"
    message = " ".join(str(error).split())
    return _shortened(iter([f"error: {type(error).__name__}" + (f": {message}" if message else "")]))


def _too_slow() -> str:
    return f"error: took longer than {TIME_LIMIT_SECS} seconds"

"""From a command line to a dataclass of options, and from a mistake to one sentence."""

import contextlib
import errno
import inspect
import io
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import TypeVar

import tyro

from nanochat import paths
from nanochat.errors import UserError

Options = TypeVar("Options")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
MAKE_ROOM = "make room there, or set NANOCHAT_BASE_DIR to a folder on another disk, and run again"
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EROFS: "set NANOCHAT_BASE_DIR to a folder you can write to",
    errno.EACCES: "give yourself the right to, or set NANOCHAT_BASE_DIR to a folder you can write to",
}
"""What to do about the operating system's refusals that a user can mend."""
DEMO_HELP = " With --demo: on the demo's data and in its folder, at its size"
QUICK_HELP = "; with --quick, smaller still"
HELP_WIDTH = 80


def run(
    main: Callable[[Options], None],
    options: type[Options],
    *,
    demo: Options | None = None,
    quick: Options | None = None,
    args: list[str] | None = None,
) -> None:
    """Parse the command line into `options`, call `main` with it and exit.

    `--demo` moves the base directory to its folder `demo` and takes `demo` as the defaults;
    `--quick` is the same with `quick` as the defaults. Every other option still overrides them.
    `options.more_help`, if there is one, is shown by `--help` before the options.

    Exits with 0, with 2 and one sentence for what the user can mend, or with 130 after Ctrl-C.
    A disk that is full or may not be written to counts as something the user can mend, wherever it is met.
    """
    args = list(sys.argv[1:] if args is None else args)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as scripts/__init__.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(parse(options, args, demo=demo, quick=quick))
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        _complain(f"cannot use {_place(error)} ({error.strerror}): {REMEDIES[error.errno]}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _complain(sentence: str) -> None:
    """Print the sentence and exit. Every process does: its mistake may be its own."""
    rank = os.environ.get("RANK", "0")
    print(f"error: {sentence}" if rank == "0" else f"process {rank}: error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def _place(error: OSError) -> str:
    """The file that an operating system's error names, or where it most likely was: only opening a file names it."""
    return (
        os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else str(paths.base_dir())
    )


def parse(
    options: type[Options], args: list[str], *, demo: Options | None = None, quick: Options | None = None
) -> Options:
    """The options that `args` ask for. Raises UserError on an option or a value that cannot be."""
    preset = None
    if "--demo" in args or "--quick" in args:
        if demo is None:
            raise UserError("--demo and --quick are not for this script: run it without")
        preset = quick if "--quick" in args and quick is not None else demo
        args = [arg for arg in args if arg not in ("--demo", "--quick")]
        os.environ["NANOCHAT_BASE_DIR"] = str(paths.base_dir() / "demo")
    description = inspect.getdoc(options) or ""
    if demo:
        description += f"{DEMO_HELP}{QUICK_HELP if quick else ''}."
    # tyro breaks no lines here, which a terminal then does within words, and of ours it keeps those that are indented.
    paragraphs = description.split("\n\n")
    description = "\n\n".join(textwrap.fill(text, HELP_WIDTH, subsequent_indent="  ") for text in paragraphs)
    if more := getattr(options, "more_help", ""):
        description += f"\n\n{more}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options,
                args=args,
                prog=os.environ.get("NANOCHAT_COMMAND"),
                default=options() if preset is None else preset,
                description=description,
                # The last two are for options that hold sub-commands: short names, and options on either side of them.
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.CascadeSubcommandArgs,
                ),
            )
    except BrokenPipeError:  # --help, and its reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UserError(f"{_first_sentence(complaint.getvalue())}; --help lists the options") from None


def _first_sentence(box: str) -> str:
    """The message inside the box that tyro draws around a mistake, on one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    until = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return " ".join(lines[:until]) or "the options cannot be read"

"""Parse a command line into a dataclass of options, and turn user errors into one line and exit code 2."""

import contextlib
import errno
import inspect
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import TypeVar

import tyro

from nanochat import paths
from nanochat.errors import UserError

Options = TypeVar("Options")
EXIT_INTERRUPTED = 130
MAX_MESSAGE = 900
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
STAGE_COMMAND = r"\./(prepare|pretrain|midtrain|sft|rl)\.sh|\./nanochat\.sh (watch|report|checkpoints)"
FREE_SPACE = "free some space there, or set NANOCHAT_BASE_DIR to a folder on another disk, and run again"
OS_ERROR_FIXES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EEXIST: "move that file or broken link away, or set NANOCHAT_BASE_DIR to another folder",
    errno.ELOOP: "move that link away, or set NANOCHAT_BASE_DIR to another folder",
    errno.ENOTDIR: "move that file away, or set NANOCHAT_BASE_DIR to another folder",
    errno.EIO: "check the disk, or set NANOCHAT_BASE_DIR to a folder on another one",
    errno.EROFS: "set NANOCHAT_BASE_DIR to a folder you can write to",
    errno.EPERM: "set NANOCHAT_BASE_DIR to a folder you can write to",
    errno.EACCES: "change its permissions, or set NANOCHAT_BASE_DIR to a folder you can write to",
}


def run(
    main: Callable[[Options], None],
    options: type[Options],
    *,
    demo: Options | None = None,
    quick: Options | None = None,
    args: list[str] | None = None,
) -> None:
    """Parse options, call `main` and exit: with 2 after a one-line UserError or a full disk, with 130 after Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not re.fullmatch(r"[0-9]{1,5}", os.environ.get("COLUMNS", "80")):
        del os.environ["COLUMNS"]  # rich and tyro convert it to a number without a check
    try:
        _check_torchrun_variables()
        main(parse(options, args, demo=demo, quick=quick))
        return
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in OS_ERROR_FIXES:
            raise
        # Only errors from opening a file include its name.
        place = error.filename if isinstance(error.filename, str) else paths.base_dir()
        message = f"cannot use {place} ({error.strerror}): {OS_ERROR_FIXES[error.errno]}"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)  # torch's threads may abort a process that exits regularly
        sys.exit(EXIT_INTERRUPTED)
    # One line that ends with the fix, whatever a file or an option that it quotes contains.
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    message = "".join(c if c.isprintable() else " " for c in message)
    message = re.sub(STAGE_COMMAND, rf"\g<0>{paths.demo_option()}", message)
    rank = os.environ.get("RANK", "")
    process = f"process {rank}: " if rank.isdecimal() and rank != "0" else ""
    print(f"{process}error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _check_torchrun_variables() -> None:
    """Raise UserError for values that torchrun never sets, as a cluster or a shell may have left them."""
    values = {name: os.environ[name] for name in TORCHRUN_VARIABLES if name in os.environ}
    if wrong := [name for name, value in values.items() if not re.fullmatch(r"\d{1,6}", value, re.ASCII)]:
        raise UserError(f"{wrong[0]} must be a number, as set by torchrun, got {values[wrong[0]]!r:.50}: unset it")
    if int(values.get("WORLD_SIZE", "1")) > 1 and not ("MASTER_PORT" in values and os.environ.get("MASTER_ADDR")):
        raise UserError(f"WORLD_SIZE is {values['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT: unset it")


def parse(
    options: type[Options], args: list[str], *, demo: Options | None = None, quick: Options | None = None
) -> Options:
    """Parse `args`. Raises UserError if an option is unknown or a value is invalid.

    `--demo` changes the base directory to its subfolder `demo` and uses `demo` as the defaults; `--quick` does the same
    with `quick`. `--help` prints the docstring of `options`, then its attribute `more_help` if it has one.
    """
    defaults = None
    if "--demo" in args or "--quick" in args:
        if demo is None:
            raise UserError("--demo and --quick are not supported by this script: run it without them")
        defaults = quick if "--quick" in args and quick is not None else demo
        args = [arg for arg in args if arg not in ("--demo", "--quick")]
        os.environ["NANOCHAT_BASE_DIR"] = str(paths.base_dir() / "demo")
        os.environ["NANOCHAT_DEMO"] = "1"
    error_text = io.StringIO()
    try:
        with contextlib.redirect_stderr(error_text):
            return tyro.cli(
                options,
                args=args,
                prog=os.environ.get("NANOCHAT_COMMAND"),
                default=options() if defaults is None else defaults,
                description=_description(options, demo, quick),
                # The last two give options that hold subcommands short names that may come before or after them.
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
            )
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        message = _first_message(error_text.getvalue()).rstrip(".")
        if match := re.match(r"Error parsing (--[\w-]+): (?!.*Expected one of)", message):
            option = match[1]
            value = args[args.index(option) + 1] if option in args[:-1] else ""
            message = f"{option} got an invalid value: {value!r}"
        raise UserError(f"{message}; --help lists the options") from None


def _description(options: type, demo: object, quick: object) -> str:
    text = inspect.getdoc(options) or ""
    if demo is not None:
        even_smaller = "; with --quick, even smaller" if quick is not None else ""
        text += f" With --demo: small defaults, the demo's data and folder{even_smaller}."
    # tyro does not wrap lines and would join those that are not indented.
    paragraphs = [textwrap.fill(part, 80, subsequent_indent="  ") for part in text.split("\n\n")]
    return "\n\n".join(filter(None, [*paragraphs, getattr(options, "more_help", "")]))


def _first_message(box: str) -> str:
    """The message inside the box that tyro draws around an error, on one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    end = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return " ".join(lines[:end]) or "invalid options"

"""The exception whose message is meant for users."""


class UserError(Exception):
    """An error that the user can fix: one line with the problem and the command or setting that fixes it.

    `nanochat.cli.run` prints it without a traceback and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Return the type and message of an exception on one line, for a UserError or a note."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:200]

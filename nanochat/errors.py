"""The exception whose message is meant for users."""


class UserError(Exception):
    """An error that the user can fix: one line with the problem and the command or setting that fixes it.

    `nanochat.cli.run` prints it without a traceback and exits with code 2.
    """

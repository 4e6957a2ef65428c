"""The one exception that a person, rather than a programmer, is meant to read."""


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong and what to type.

    Library code raises it; `nanochat.cli.run` prints it without a traceback and exits with code 2.
    """

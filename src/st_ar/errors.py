"""The exceptions that users are meant to see."""


class UserError(ValueError):
    """A mistake that the user can mend: its message names the cause, the values seen and the remedy.

    The command line prints it in one line, without a traceback, and exits with status 2.
    """


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has saved itself."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

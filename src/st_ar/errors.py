"""The exceptions that users are meant to see."""

LONGEST = 1200
"""Characters of a message; only those that quote damaged files could have more."""


class UserError(ValueError):
    """A mistake that the user can mend: its message names the cause, the values seen and the remedy.

    The command line prints it in one line, without a traceback, and exits with status 2. Whatever the values seen hold, the
    message is one line, and not a long one: its middle is left out, since the cause comes first and the remedy last.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [..] {line[-LONGEST // 2 :]}")


def cause(error: BaseException) -> str:
    """What an error of a library says, in one line that is short enough to stand inside another."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has saved itself."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

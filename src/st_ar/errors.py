"""The one exception that users are meant to see."""


class UserError(ValueError):
    """A mistake that the user can mend: its message names the cause, the values seen and the remedy.

    The command line prints it in one line, without a traceback, and exits with status 2.
    """

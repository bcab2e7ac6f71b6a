"""Errors a user can cause and mend: the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The run cannot go on for a reason outside the code; the message says what is wrong and the way out."""

    exit_code = 1


class UsageError(UserError):
    """The command or its settings were given wrongly; nothing was started."""

    exit_code = 2

"""What ends a run early, and with which exit status: 2 for what the user gave, 1 for a failure, 75 for 'resume me'."""

from __future__ import annotations

import functools

from ssmzoo.released.files import CheckpointError

RESUME_ME = 75  # EX_TEMPFAIL: the run was asked to stop, or could not save its end, and can be resumed


class UserError(ValueError):
    """What the user gave cannot be used; nothing was written."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message says what happened, where, and what to do."""


def user_errors(function):
    """Errors while configuring and building are the user's: one message, exit status 2."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (
            ValueError,
            TypeError,
            CheckpointError,
            FileNotFoundError,
            PermissionError,
            NotADirectoryError,
        ) as error:
            raise UserError(str(error)) from error

    return wrapped

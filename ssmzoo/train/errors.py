"""What ends a run early, and with which exit status: 2 for what the user gave, 1 for a failure, 75 for 'resume me'."""

from __future__ import annotations

import functools

from ssmzoo.released.files import CheckpointError

RESUME_ME = 75  # EX_TEMPFAIL: the run was asked to stop, or could not save its end, and can be resumed


class UserError(ValueError):
    """What the user gave cannot be used; nothing was written."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message says what happened, where, and what to do."""


def _told(error: Exception) -> str:
    """What a library says, in a line, by whose name one may look for it."""
    return f"{' '.join(str(error).split()) or 'no reason given'} ({type(error).__name__}; --traceback shows where)"


def user_errors(function):
    """Errors while configuring and building are the user's: one message, exit status 2."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, CheckpointError, OSError) as error:
            raise UserError(str(error)) from error
        except (RuntimeError, ArithmeticError, AssertionError, LookupError, AttributeError) as error:
            if isinstance(error, TrainingFailed):
                raise
            raise UserError(_told(error)) from error  # a library below that does not foresee such a value
        except Exception as error:
            if type(error).__name__ != "MisconfigurationException":  # Lightning's, which is a plain Exception
                raise
            raise UserError(_told(error)) from error

    return wrapped

"""The exceptions of this package. The message of each is one line.

    Problem
    ├── UserError ── AudioError
    ├── Refused ── NotAdmitted
    ├── SessionLost
    ├── GaveUp
    └── Stopped

What is none of these, and no OSError, is a fault in this program: `fault` describes it.
"""

import os
import traceback


class Problem(Exception):
    """What stops a transcription, or a part of it, although this program is right."""


class UserError(Problem):
    """The user can correct it: options, files, devices. The message names the remedy."""


class AudioError(UserError):
    """The audio cannot be read, or is damaged."""


class Refused(Problem):
    """The server refuses this, and will refuse it again."""


class NotAdmitted(Refused):
    """The server does not admit who asks: the key or the origin is wrong."""


class SessionLost(Problem):
    """The session broke off or was not granted: a new one may continue where it stopped.

    `busy`: the server works, but all its sessions are taken. `retry_after`: seconds to wait, if the server names them.
    """

    def __init__(self, message: str, *, busy: bool = False, retry_after: float = 0.0):
        super().__init__(message)
        self.busy, self.retry_after = busy, retry_after


class GaveUp(Problem):
    """There was no progress for too long. All final words have been yielded."""


class Stopped(Problem):
    """Ctrl+C came before the end of a file."""


def fault(error: BaseException) -> str:
    """Return one line that reports an error in this program, with its place in the code."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({os.path.basename(frame.filename)}, line {frame.lineno})" for frame in frames)
    return f"internal error, please report it: {type(error).__name__}: {error}{where}"

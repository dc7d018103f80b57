"""What can go wrong between a verdict and an answer. Every message is one line: what, where, what to do.

ServingError
 ├─ BadInput          2  the caller's file, name, array or argument
 ├─ Refused           1  understood and denied: what was not promoted is not served
 ├─ Broken            5  disk, port, process
 │   └─ Crashed           a server that died of a signal
 ├─ WrongAnswer       5  an endpoint does not answer as the gate saw the model answer
 └─ AnswerError       5  no answer came back; `reason` is a closed set, fit for a metric label
     ├─ Unavailable       unavailable, queue_full, internal
     ├─ DeadlineExceeded  timeout
     └─ Rejected          invalid, unknown_model, bad_output, version_changed
"""

from __future__ import annotations

import errno
from pathlib import Path


class ServingError(Exception):
    """Base of this room's errors; `exit_code` is the exit code of a process that ends with it."""

    exit_code = 5


class BadInput(ServingError):
    """Something the caller handed in is missing, malformed or out of range."""

    exit_code = 2


class Refused(ServingError):
    """The request was understood and denied."""

    exit_code = 1


class Broken(ServingError):
    """The surroundings failed: disk, port, process."""

    exit_code = 5


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}  # nothing that another argument mends


def unwritable(path: Path | str, error: OSError) -> ServingError:
    """BadInput for a place that cannot be written, such as one below a file; Broken where the machine is in the way."""
    kind = Broken if error.errno in MACHINE else BadInput
    return kind(f"{path}: cannot be written: {error.strerror or error}")


class Crashed(Broken):
    """A server died of a signal, by its own fault or by a kill from outside."""


class WrongAnswer(ServingError):
    """An endpoint answers, but not as the gate saw the model answer."""

    exit_code = 5


class AnswerError(ServingError):
    """An inference request without a usable answer."""

    exit_code = 5

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Unavailable(AnswerError):
    """Nobody answered: no connection, a full queue, a server that failed inside."""


class DeadlineExceeded(AnswerError):
    """The answer did not come in time."""


class Rejected(AnswerError):
    """The server refused the request, or its answer cannot be believed."""

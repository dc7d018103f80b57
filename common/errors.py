"""The errors a user can meet. Each message is one line: what, where, and what to do.

DfmclError
 ├─ Refused        1  the answer is no: a model that has not passed, a digest that does not hold
 ├─ BadInput       2  a file, key, name, array or argument is wrong
 ├─ Broken         5  the machine, the network, a process or a server is in the way
 │   └─ Crashed       a server that died of a signal
 ├─ Interrupted  130 or 143  a signal or the clock ended the work, and it can go on
 ├─ WrongAnswer    5  an endpoint does not answer as the gate saw the model answer
 └─ AnswerError    5  no answer came back; `reason` is a closed set, fit for a metric label
     ├─ Unavailable       unavailable, queue_full, internal
     ├─ DeadlineExceeded  timeout
     └─ Rejected          invalid, unknown_model, bad_output, version_changed
"""

from __future__ import annotations

import errno
from pathlib import Path


class DfmclError(Exception):
    """Base of all errors with a meaning for the caller; `exit_code` is the process's exit code."""

    exit_code = 5


class Refused(DfmclError):
    """The request was understood and denied."""

    exit_code = 1


class BadInput(DfmclError):
    """Something the caller handed in is missing, malformed or out of range."""

    exit_code = 2


class Broken(DfmclError):
    """The surroundings failed: disk, port, process, network."""

    exit_code = 5


class Interrupted(DfmclError):
    """The work was asked to stop; the message says what is kept and how to go on."""

    exit_code = 130


class Crashed(Broken):
    """A server died of a signal, by its own fault or by a kill from outside."""


class WrongAnswer(DfmclError):
    """An endpoint answers, but not as the gate saw the model answer."""

    exit_code = 5


class AnswerError(DfmclError):
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


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}  # nothing that another argument mends


def unwritable(path: Path | str, error: OSError) -> DfmclError:
    """BadInput for a place that cannot be written, such as one below a file; Broken where the machine is in the way."""
    kind = Broken if error.errno in MACHINE else BadInput
    return kind(f"{path}: cannot be written: {error.strerror or error}")


# As numpy, torch on a CPU and on a GPU, CUDA's libraries and ONNX Runtime say it; their classes have nothing in common.
LACK = (
    "can't allocate memory", "out of memory", "ALLOC_FAILED", "Failed to allocate memory", "bad_alloc",
    "array is too big", "Maximum allowed dimension", "size calculation overflowed",
)  # fmt: skip


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, or could never hold what was asked for."""
    if hasattr(error, "exit_code"):  # one of a room's own
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error) for words in LACK)


def without_memory(message: str) -> str:
    """What was asked for, as far as the first two sentences of a library tell it, and what to do."""
    said = " ".join(message.split()).rpartition("DefaultCPUAllocator: ")[2]  # torch begins with a place in its source
    asked = ". ".join(said.split(". ")[:2])
    advice = "take fewer or smaller images, a smaller batch or network, or a machine that has more"
    return f"not enough memory{f': {asked}' if asked else ''}; {advice}"

"""The errors a user can meet. Each message is one line: what, where, and what to do.

DfmclError
 ├─ Refused   1  the answer is no: a model that has not passed, a digest that does not hold
 ├─ BadInput  2  a file, key or argument is wrong
 └─ Broken    5  the machine, the network or a server is in the way
"""

from __future__ import annotations


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

"""Whoever computes beside a server lets its users go first."""

from __future__ import annotations

import os
from pathlib import Path

AUTOGROUP = Path("/proc/self/autogroup")
NICENESS = 19  # the most there is: a core is shared 1 to 68


def give_way() -> None:
    """From now on this process, with all threads that it starts, computes with what others leave.

    Linux weighs niceness among processes of one session, and sessions by a niceness of their own (autogroups, sched(7)),
    which is set too where the process leads its session, as a service does. In a cgroup with a CPU controller neither
    counts against other cgroups: there its weight does.
    """
    os.nice(NICENESS)
    if os.getsid(0) == os.getpid() and AUTOGROUP.exists():
        try:
            AUTOGROUP.write_text(str(NICENESS))
        except OSError:  # a read-only /proc, as in containers, which have cgroups
            return

"""The sidecar computes with what others leave."""

from __future__ import annotations

import subprocess
import sys

import pytest

from monitoring.courtesy import AUTOGROUP

SHOW = """
import os, threading
from monitoring.courtesy import AUTOGROUP, give_way
give_way()
threads = []
thread = threading.Thread(target=lambda: threads.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
thread.start()
thread.join()
print(threads[0], AUTOGROUP.read_text().split()[-1] if AUTOGROUP.exists() else "none")
"""


@pytest.mark.parametrize("leads", [True, False], ids=["a service", "a command of a shell"])
def test_threads_are_nice_and_so_is_a_session_of_its_own(leads: bool) -> None:
    """Of a shell's session it leaves the niceness alone: the shell's other commands are none of its business."""
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, start_new_session=leads
    ).stdout.split()
    before = AUTOGROUP.read_text().split()[-1] if AUTOGROUP.exists() else "none"
    assert shown == ["19", "19" if leads and before != "none" else before]

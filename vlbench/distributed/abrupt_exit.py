"""The end of a process that an error has left in a process group of GPUs.

To leave such a group, as Python's own end would, NCCL waits for the other processes. They wait for
this one in the middle of a step, and whoever watches them waits for one of them to end. So the
process reports the error, and ends without anything else. It imports no torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def run_and_exit(run: Callable[[], int]) -> int:
    """Return the exit code that `run` returns; where a group is left open, end the process with it.

    An exception goes on, or is printed if it cannot.
    """
    try:
        exit_code = run()
    except SystemExit as end:
        if not is_group_open():
            raise
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        if not is_group_open():
            raise
        traceback.print_exc()
        exit_code = 1
    if is_group_open():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(exit_code)
    return exit_code


def is_group_open() -> bool:
    """Tell whether this process is in a process group of torch."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return False
    return bool(distributed.is_initialized())

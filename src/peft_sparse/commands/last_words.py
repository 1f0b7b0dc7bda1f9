"""Lets one line be the last on standard error, also where a launcher prints a traceback of its own after an error."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
# A process of its own, because the launcher prints when the processes that it started have ended.
WAITING = """
import os, sys, time, psutil
launcher, begun, line, claim = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        process = psutil.Process(launcher)
        if process.create_time() != begun or process.status() == psutil.STATUS_ZOMBIE:
            break
    except psutil.NoSuchProcess:
        break
    time.sleep(0.05)
print(line, file=sys.stderr, flush=True)
os.unlink(claim)
"""


def say_last(line: str) -> None:
    """Print `line` on standard error: now, or if a launcher has started this process, when the launcher has ended.

    Of several processes of one launcher, the first that comes here prints.
    """
    launcher = _launcher()
    if launcher is None:
        print(line, file=sys.stderr, flush=True)
        return
    claim = Path(tempfile.gettempdir(), f"peft-sparse-{launcher.pid}-{launcher.create_time()}")
    with contextlib.suppress(FileExistsError):
        claim.touch(exist_ok=False)
        words = [str(launcher.pid), repr(launcher.create_time()), line, str(claim)]
        # In a session of its own, it is not ended with the processes of the launcher.
        subprocess.Popen(
            [sys.executable, "-c", WAITING, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def _launcher() -> Any:
    """Return the parent of this process as psutil knows it, if it is a launcher. Otherwise None."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return None
    # A requirement of accelerate.
    import psutil

    try:
        parent: Any = psutil.Process(os.getppid())
        words = " ".join(parent.cmdline())
    except psutil.Error:
        return None
    return parent if any(name in words for name in LAUNCHERS) else None

"""Children that begin with everything imported, and may be killed.

The process that forks them must have no threads, whose locks the children would wait for. A process of pytest that has
run other tests has some: tests start a process of their own, and fork there.
"""

import gc
import os
import signal
import threading
import time
import traceback
import warnings

import torch
from tqdm import tqdm


def forked(call) -> int:
    """Run `call` in a child process, and return the child's id. The child exits with 0, or with 1 after an error."""
    with warnings.catch_warnings():
        # Python warns of threads that the child does not have. The children use none.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        # The threads of the parent are not there, and its objects need not be looked at.
        torch.set_num_threads(1)
        # tqdm's own lock is one semaphore for all children. A child that is killed while it holds it would stop the
        # next one for good.
        tqdm.set_lock(threading.RLock())
        gc.freeze()
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of pytest may run in the child.
        os._exit(code)


def ended(child: int, seconds: float = 60) -> int:
    """Wait for a child. Return its exit code, or minus the signal that killed it. A child that hangs is killed."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"The child did not end within {seconds} s.")
        time.sleep(0.005)

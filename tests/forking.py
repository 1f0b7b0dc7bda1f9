"""Children of the test process: they begin with everything imported, and may be killed."""

import gc
import os
import traceback
import warnings

import torch


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
        gc.freeze()
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of pytest may run in the child.
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child. Return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

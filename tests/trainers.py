"""What tests of training share: small arguments, a run that is cut off, and runs in two processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from peft_sparse import SparseTrainingArguments


def arguments(path, kind=SparseTrainingArguments, **kwargs):
    defaults = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-2}
    defaults |= {"per_device_train_batch_size": 4, "use_cpu": True, "dataloader_pin_memory": False}
    return kind(str(path), **(defaults | kwargs))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def importing(path):
    """Return code that imports the test module at `path` as `tests`, with what all tests share."""
    folders = [str(Path(path).parent), str(Path(__file__).parent)]
    return f"import sys; sys.path[:0] = {folders}; import {Path(path).stem} as tests"


def in_two_processes(folder, path, call):
    """Run `call` of the test module at `path` in two processes that torchrun starts."""
    script = folder / "script.py"
    script.write_text(
        f"{importing(path)}\ntests.{call}\n"
        # A thread of gloo that outlives the interpreter aborts the process. This happens now and then also after the
        # group is destroyed, so the interpreter is not taken down at all: what the call found is known.
        "import os; from torch import distributed\n"
        "distributed.barrier(); distributed.destroy_process_group(); os._exit(0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate_configs"


def launch(strategy, folder, *what):
    """Run distributed.py in two processes, every mode of it or `what`, by a configuration that the examples ship."""
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [
        str(CONFIGS / f"{strategy}.yaml"),
        str(Path(__file__).parent / "distributed.py"),
        strategy,
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run([*command, *what], env=environment, capture_output=True, text=True, timeout=900)

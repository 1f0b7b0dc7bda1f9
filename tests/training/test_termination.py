"""SIGTERM ends training after the step, with a checkpoint from which it goes on as if nothing had been."""

import os
import signal
from functools import partial

import pytest
from peft import get_peft_model
from transformers import TrainerCallback

from peft_sparse import MaskLoRAConfig, SparseTrainer

from checks import assert_same_weights
from conftest import Samples, tiny
from trainers import arguments


arguments = partial(arguments, max_steps=8, sparsity=0.75, save_on_sigterm=True)

# Resuming from a checkpoint in the other modes: test_resuming.py.
MODES = {
    "cycles": (True, {"pruning_schedule": "cycles", "pruning_rounds": 2}),
    "unfinished batch": (False, {"gradient_accumulation_steps": 2, "max_steps": 4}),
}


class TerminatedIn(TrainerCallback):
    """Sends SIGTERM to its own process in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("mode", MODES)
def test_a_terminated_run_resumes_as_if_nothing_had_been(tmp_path, mode):
    adapted, options = MODES[mode]

    def trainer(path, **kwargs):
        model = tiny("llama")
        if adapted:
            config = MaskLoRAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
        return SparseTrainer(model, arguments(path, **options), train_dataset=Samples(), **kwargs)

    handler = signal.getsignal(signal.SIGTERM)
    whole = trainer(tmp_path / "whole")
    whole.train()
    stop = whole.state.max_steps - 2
    first = trainer(tmp_path / "halves", callbacks=[TerminatedIn(stop - 1)])
    first.train()
    assert first.state.global_step == stop
    assert [path.name for path in (tmp_path / "halves").glob("checkpoint-*")] == [f"checkpoint-{stop}"]
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = trainer(tmp_path / "halves")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)

"""What tests of training share: small arguments, and a run that is cut off."""

from transformers import TrainerCallback

from peft_sparse import SparseTrainingArguments


def arguments(path, kind=SparseTrainingArguments, **kwargs):
    defaults = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-2}
    return kind(
        str(path), use_cpu=True, dataloader_pin_memory=False, per_device_train_batch_size=4, **(defaults | kwargs)
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step

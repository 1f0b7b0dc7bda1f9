"""Runs with several adapters, or with one that is not called "default", resume and end as those with one adapter."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from peft_sparse import MaskLoRAConfig, SparseTrainer

from conftest import Samples, tiny
from trainers import arguments


TOKENS = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(2))


def config():
    return MaskLoRAConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False)


def two(*active):
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config())
    model.add_adapter("other", config())
    model.base_model.set_adapter(list(active))
    return model


def one():
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), config(), adapter_name="mine")


MODELS = {
    "one adapter of another name": one,
    "the second is active": lambda: two("other"),
    "both are active": lambda: two("default", "other"),
}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


class Remembers(TrainerCallback):
    """Remembers what the model computes after each step."""

    def __init__(self):
        self.logits = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.logits[state.global_step] = logits(model)
        model.train()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_best_model_is_loaded_and_a_run_is_resumed(make, tmp_path):
    def trainer(**options):
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        args = arguments(tmp_path, metric_for_best_model="chosen", greater_is_better=True, **steps | options)
        data = {"train_dataset": Samples(), "eval_dataset": Samples(4)}
        chosen = iter([0, 1, 0, 0])  # the second step is the best
        return SparseTrainer(
            make(), args, **data, callbacks=[seen], compute_metrics=lambda _: {"chosen": next(chosen)}
        )

    seen = Remembers()
    first = trainer(load_best_model_at_end=True)
    first.train()
    last = seen.logits[4]
    assert torch.equal(logits(first.model), seen.logits[2])
    assert not torch.equal(last, seen.logits[2])

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), last)
    assert resumed.model.active_adapters == first.model.active_adapters

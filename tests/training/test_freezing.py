"""Gradual freezing and unfreezing of blocks, in full fine-tuning and with adapters."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import (
    FreezingCallback,
    MaskLoRAConfig,
    PruningCallback,
    PruningCycles,
    SparseTrainer,
    ZeroGuardCallback,
    prune,
    sparsity,
)
from peft_sparse.model.blocks import find_blocks

from checks import assert_same_zeros, zeros_of
from conftest import Samples, tiny
from trainers import arguments, in_two_processes


class Moved(TrainerCallback):
    """Which blocks each optimiser step moved, by index."""

    def __init__(self):
        self.steps = []

    def _look(self, model):
        return [[p.detach().clone() for p in block.parameters()] for block in find_blocks(model).values()]

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self._look(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        pairs = enumerate(zip(self.before, self._look(model), strict=True))
        same = {i for i, (old, new) in pairs if all(map(torch.equal, old, new))}
        self.steps.append("".join("." if i in same else "x" for i in range(len(self.before))))


def pruned():
    model = tiny("llama")
    prune(model, 0.5)
    return model


TRAINED = {
    ("freeze", False): ["xxx", "xxx", ".xx", ".xx", "..x", "..x"],
    ("freeze", True): ["xxx", "xxx", "xx.", "xx.", "x..", "x.."],
    ("unfreeze", False): ["x..", "x..", "xx.", "xx.", "xxx", "xxx"],
    ("unfreeze", True): ["..x", "..x", ".xx", ".xx", "xxx", "xxx"],
}


@pytest.mark.parametrize(("mode", "reverse"), TRAINED)
def test_the_frozen_blocks_are_those_of_the_table(mode, reverse):
    callback = FreezingCallback(mode, reverse=reverse)
    frozen = [callback.frozen(step, 6, 3) for step in range(6)]
    assert ["".join("." if block in indices else "x" for block in range(3)) for indices in frozen] == TRAINED[
        mode, reverse
    ]


@pytest.mark.parametrize(("mode", "reverse"), [("freeze", False), ("unfreeze", True)])
def test_the_blocks_that_are_trained_follow_the_steps(tmp_path, mode, reverse):
    model, moved = pruned(), Moved()
    zeros, head = zeros_of(model), model.lm_head.weight.clone()
    args = arguments(tmp_path, weight_decay=0.1, lr_scheduler_type="constant", gradient_accumulation_steps=2)
    callbacks = [FreezingCallback(mode, reverse=reverse), moved]
    SparseTrainer(model, args, train_dataset=Samples(), callbacks=callbacks).train()
    assert moved.steps == TRAINED[mode, reverse]
    assert_same_zeros(model, zeros)
    assert not torch.equal(model.lm_head.weight, head)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_step_trains_a_block_and_each_its_share():
    for mode in ("freeze", "unfreeze"):
        for blocks, steps in ((1, 1), (3, 2), (4, 100), (32, 7)):
            counts = [len(FreezingCallback(mode).frozen(step, steps, blocks)) for step in range(steps)]
            assert max(counts) < blocks
            assert counts == sorted(counts, reverse=mode == "unfreeze")
            assert counts[0 if mode == "freeze" else -1] == 0


def test_each_cycle_begins_anew():
    callback = FreezingCallback("freeze", rounds=2)
    counts = [len(callback.frozen(step, 7, 3)) for step in range(7)]
    assert counts == [0, 1, 2, 0, 0, 1, 2]


def test_weights_unfrozen_after_pruning_on_the_way_keep_their_zeros(tmp_path):
    """The zeros of a block that is frozen while others look are guarded when its turn comes."""
    model, moved = tiny("llama"), Moved()
    args = arguments(tmp_path, TrainingArguments, max_steps=8, lr_scheduler_type="constant", weight_decay=0.1)
    freezing = FreezingCallback("unfreeze", rounds=2)
    callbacks = [freezing, PruningCallback(0.75, schedule=PruningCycles(2)), ZeroGuardCallback(), moved]
    Trainer(model, args, train_dataset=Samples(), callbacks=callbacks).train()
    assert moved.steps == ["x..", "xx.", "xxx", "xxx"] * 2
    assert sparsity(model) == 0.75
    assert all(parameter._backward_hooks in (None, {}) for parameter in model.parameters()), "hooks stayed"


def test_frozen_blocks_have_no_gradient_and_no_state_of_the_optimiser(tmp_path):
    model = pruned()
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            last = list(model.model.layers[2].parameters())
            seen.append((any(p.grad is not None for p in last), any(p in optimizer.state for p in last)))

    callbacks = [FreezingCallback("unfreeze"), Look()]
    SparseTrainer(model, arguments(tmp_path), train_dataset=Samples(), callbacks=callbacks).train()
    # The optimiser's state comes with the first step.
    assert seen == [(False, False)] * 4 + [(True, False), (True, True)]


def test_adapters_freeze_with_their_blocks_and_the_base_stays_frozen(tmp_path):
    model, moved = get_peft_model(pruned(), MaskLoRAConfig(r=2, target_modules="all-linear")), Moved()
    args = arguments(tmp_path, lr_scheduler_type="constant")
    SparseTrainer(model, args, train_dataset=Samples(), callbacks=[FreezingCallback(), moved]).train()
    assert moved.steps == ["xxx", "xxx", ".xx", ".xx", "..x", "..x"]
    assert all(p.requires_grad == ("mask_lora" in name) for name, p in model.named_parameters())


def unfrozen_step_by_step(folder, batch):
    args = arguments(folder / "run", ddp_find_unused_parameters=True, optim="sgd")
    args.per_device_train_batch_size = batch
    trainer = SparseTrainer(pruned(), args, train_dataset=Samples(), callbacks=[FreezingCallback("unfreeze")])
    trainer.train()
    return trainer


def train_in_one_of_two_processes(folder):
    trainer = unfrozen_step_by_step(Path(folder), 2)
    torch.save(trainer.model.state_dict(), Path(folder) / f"{trainer.args.process_index}.pt")


@pytest.mark.slow
def test_two_processes_unfreeze_as_one_does(tmp_path):
    in_two_processes(tmp_path, __file__, f"train_in_one_of_two_processes({str(tmp_path)!r})")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in unfrozen_step_by_step(tmp_path, 4).model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected)

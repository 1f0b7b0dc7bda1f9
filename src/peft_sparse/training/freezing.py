"""Gradual freezing and unfreezing of blocks during training."""

from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.blocks import find_blocks
from .pruning_schedules import cycle_of


class FreezingCallback(TrainerCallback):
    """Freezes the blocks one after another during training, or unfreezes them. Works with any `transformers.Trainer`.

    Let L be the number of blocks that hold trained parameters, T the number of optimiser steps, and t the current
    step, counted from 0. Mode "freeze" begins with all blocks trained, and freezes ⌊L · t / T⌋ of them in step t.
    Mode "unfreeze" is the reverse in time: it freezes ⌊L · (T - 1 - t) / T⌋ blocks in step t, and none at the end.
    Each step trains at least one block. Zimmer et al. 2023, arXiv:2312.15230v2, section 3.4. The paper does not say
    how to round, whether to count steps or epochs, and whether parameters outside the blocks are frozen. Here such
    parameters are trained in every step, unless they were frozen before training.

    A frozen block gets no gradient, no momentum update and no weight decay. The gradients of its weights are not
    computed. The gradients of its inputs are computed only if something before the block is trained, for example the
    embeddings. The callback freezes and unfreezes exactly the parameters that are trained when training begins:
    weights or adapters. When training ends, none of them is frozen. `SparseTrainer` also unfreezes them if training
    raises. With another Trainer that has raised, call `release`, or train again with the same callback.

    The frozen blocks depend only on the step and the number of steps, so that a run can be resumed.

    Args:
        mode: "freeze" or "unfreeze".
        reverse: False freezes and unfreezes from the first block to the last, True from the last to the first.
        rounds: training is divided into this many parts of equal length, and the mode runs once in each part. The last
            part also has the steps that are left over. The parts are the cycles of `PruningCycles(rounds)`. t and T
            count within a part.

    Raises:
        ValueError: `mode` is unknown or `rounds` is below 1. When training begins: no block has a trained parameter,
            or training is parallel in a way that needs a gradient of every parameter in every step.
    """

    def __init__(
        self, mode: Literal["freeze", "unfreeze"] = "freeze", *, reverse: bool = False, rounds: int = 1
    ) -> None:
        if mode not in ("freeze", "unfreeze") or rounds < 1:
            raise ValueError(
                f"Expected `mode` 'freeze' or 'unfreeze', and `rounds` of at least 1. Got {mode!r} and {rounds}."
            )
        self.mode, self.reverse, self.rounds = mode, reverse, rounds
        self._blocks: list[list[nn.Parameter]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fsdp or args.deepspeed or (args.world_size > 1 and not args.ddp_find_unused_parameters):
            raise ValueError(
                "Frozen blocks have no gradients. FSDP and DeepSpeed wait for every gradient, and so does DDP without "
                "`ddp_find_unused_parameters=True`. Train in one process, or by DDP with that argument."
            )
        # An earlier run may have raised.
        self.release()
        model = kwargs["model"]
        trained = [[p for p in block.parameters() if p.requires_grad] for block in find_blocks(model).values()]
        self._blocks = [parameters for parameters in trained if parameters]
        if not self._blocks:
            raise ValueError(
                f"None of the {len(trained)} blocks of this {type(model).__name__} has a trained parameter, so that "
                "there is nothing to freeze. Train the weights, attach an adapter, or remove the callback."
            )

    # Not in `on_train_begin`, because the optimiser, DDP and the zero guard collect the trained parameters by then.
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        frozen = self.frozen(state.global_step, state.max_steps, len(self._blocks))
        for index, parameters in enumerate(self._blocks):
            for parameter in parameters:
                parameter.requires_grad_(index not in frozen)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Unfreeze all blocks that were trained when training began."""
        while self._blocks:
            for parameter in self._blocks.pop():
                parameter.requires_grad_(True)

    def frozen(self, step: int, steps: int, blocks: int) -> range:
        """Return the indices of the blocks that are frozen in one step.

        Args:
            step: the optimiser step of the run, counted from 0: t if `rounds` is 1.
            steps: the number of optimiser steps of the run: T if `rounds` is 1.
            blocks: L, the number of blocks that hold trained parameters.
        """
        start, total = cycle_of(step, steps, self.rounds)
        done = step - start
        count = blocks * (done if self.mode == "freeze" else total - 1 - done) // total
        from_input = self.reverse != (self.mode == "freeze")
        return range(count) if from_input else range(blocks - count, blocks)

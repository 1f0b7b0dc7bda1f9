"""Which blocks are trained when: gradual freezing and unfreezing."""

from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.blocks import find_blocks
from .pruning_schedules import cycle_of


class FreezingCallback(TrainerCallback):
    """Freezes the blocks one after another, or unfreezes them, as training goes on. Works with any `Trainer`.

    "freeze" trains all L blocks at first: in step t of T, counted from 0, ⌊L · t / T⌋ are frozen. "unfreeze" is the
    same backwards in time: ⌊L · (T - 1 - t) / T⌋ are frozen, in the end none. Each step trains at least one block. The
    order is from input to output, or the `reverse`. Zimmer et al. 2023, arXiv:2312.15230v2, section 3.4, which leaves
    open the rounding, steps or epochs, and what is outside the blocks, trained throughout unless you froze it.

    A frozen block is left alone: no gradient, no momentum, no weight decay. Gradients of its weights are not computed;
    those of its inputs are, if anything before it is trained, embeddings included. Frozen and unfrozen is what was
    trained when training began: weights, or adapters.

    Which blocks are frozen depends on the step alone, so that a run can be resumed.

    Args:
        mode: "freeze" or "unfreeze".
        reverse: from output to input.
        cycles: how often to begin anew: the n of `PruningCycles`.

    Raises:
        ValueError: an unknown mode or no cycle; when training begins: nothing to freeze, or a kind of parallelism
            that needs every gradient in every step.
    """

    def __init__(
        self, mode: Literal["freeze", "unfreeze"] = "freeze", *, reverse: bool = False, cycles: int = 1
    ) -> None:
        if mode not in ("freeze", "unfreeze") or cycles < 1:
            raise ValueError(
                f"Expected `mode` as 'freeze' or 'unfreeze' and at least one of `cycles`, got {mode!r} and {cycles}."
            )
        self.mode, self.reverse, self.cycles = mode, reverse, cycles
        self._blocks: list[list[nn.Parameter]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fsdp or args.deepspeed or (args.world_size > 1 and not args.ddp_find_unused_parameters):
            raise ValueError(
                "Frozen blocks have no gradients, for which sharded training waits, and DDP too unless told. Train in "
                "one process, or by DDP with `ddp_find_unused_parameters=True`."
            )
        model = kwargs["model"]
        trained = [[p for p in block.parameters() if p.requires_grad] for block in find_blocks(model).values()]
        self._blocks = [parameters for parameters in trained if parameters]
        if not self._blocks:
            raise ValueError(
                f"Nothing in the {len(trained)} blocks of this {type(model).__name__} is trained, so that nothing can "
                "be frozen. Train the weights, or attach an adapter, or drop the callback."
            )

    # Not when training begins: optimiser, DDP and the guard of the zeros take then what they will look after.
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
        for parameters in self._blocks:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def frozen(self, step: int, steps: int, blocks: int) -> range:
        """Return the indices of the blocks that are frozen in a step, counted from 0, of a run of `steps`."""
        start, total = cycle_of(step, steps, self.cycles)
        done = step - start
        count = blocks * (done if self.mode == "freeze" else total - 1 - done) // total
        from_input = self.reverse != (self.mode == "freeze")
        return range(count) if from_input else range(blocks - count, blocks)

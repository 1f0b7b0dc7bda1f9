"""What tests of reconstruction share: models, calibration data, a short run, and errors by their definition."""

from dataclasses import fields

import torch

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, reconstruct
from peft_sparse.calibration.runner import BlockRunner
from peft_sparse.model.blocks import find_stacks, prunable_weights
from peft_sparse.reconstruction import Fit, ReconstructionObserver
from peft_sparse.reconstruction.calls import chain_of
from peft_sparse.reconstruction.division import regions_of_submodules
from peft_sparse.reconstruction.regions import regions_of_blocks

from conftest import inputs_of, tiny


def lively(family):
    """A tiny model whose blocks do more than hand on what they are given."""
    model, generator = tiny(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def batches_of(family, count=3, size=2):
    batch = inputs_of(family, count * size)
    return [{name: rows[i : i + size] for name, rows in batch.items()} for i in range(0, count * size, size)]


OF_FIT = {field.name for field in fields(Fit)}


def split(options):
    """The arguments of `reconstruct` for `options`, in which those of `Fit` stand beside the others."""
    fit = {name: value for name, value in options.items() if name in OF_FIT}
    return {name: value for name, value in options.items() if name not in OF_FIT} | {"fit": Fit(**fit)}


def rebuild(model, calibration, **options):
    defaults = {"pattern": 0.5, "learning_rate": 5e-3, "max_steps": 6, "holdout": 0}
    return reconstruct(model, calibration=calibration, **split(defaults | options))


class Told(ReconstructionObserver):
    """Keeps what it is told, and may do something about it."""

    def __init__(self, on_step=None, on_region=None):
        self.promised, self.steps, self.regions = [], [], []
        self.on_step, self.on_region = on_step, on_region

    def start(self, steps_per_region):
        self.promised.append(steps_per_region)

    def step(self, step):
        self.steps.append(step)
        if self.on_step:
            self.on_step(step)

    def region(self, report):
        self.regions.append(report)
        if self.on_region:
            self.on_region(report)


TUNERS = {
    "full": "full",
    "MaskLoRA": MaskLoRAConfig(r=4),
    "MaskLoRA with dropout": MaskLoRAConfig(r=4, lora_dropout=0.1),
    "ScaledLoRA": ScaledLoRAConfig(r=4),
    "LoRA-Prune": MaskLoRAConfig(r=4, masking="merge"),
    "PERP": MaskLoRAConfig(r=4, train_norms=True, bias="all"),
}


class OwnError(Exception):
    """An error that is not the package's."""


def weight_of(model, name):
    return prunable_weights(model)[name].matrix().double()


def assert_close_weights(model, other, rtol=1e-4, atol=1e-5):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class Pass:
    """The states of a model on their own way through its blocks: the hidden states before the next, and its calls."""

    def __init__(self, model, stack, inputs):
        self.runner, self.stack = BlockRunner(model, stack, inputs), stack
        chains = [chain_of(self.runner, batch) for batch in self.runner.batches]
        self.hidden, self._calls = [list(part) for part in zip(*chains, strict=True)]

    def calls(self, first, count):
        return [calls[first : first + count] for calls in self._calls]

    def advance(self, first, count):
        for block in self.runner.blocks[first : first + count]:
            called = [calls[self.runner.blocks.index(block)] for calls in self._calls]
            self.hidden = [call.made(block, hidden) for call, hidden in zip(called, self.hidden, strict=True)]


def regions_at(size, way, first):
    blocks = dict(list(way.stack.items())[first : first + (size if isinstance(size, int) else 1)])
    if size != "submodule":
        return regions_of_blocks(blocks, first)
    ((name, block),) = blocks.items()
    return regions_of_submodules(name, block, first, way.hidden[0], way.calls(first, 1)[0][0])


@torch.no_grad()
def errors_by_definition(model, dense, inputs, size, mode, measured=slice(None)):
    """||f(x) - t|| / ||t|| of every region of the finished model."""
    errors = []
    for number, stack in enumerate(find_stacks(model)):
        sparse, full = Pass(model, stack, inputs), Pass(dense, find_stacks(dense)[number], inputs)
        step = size if isinstance(size, int) else 1
        for first in range(0, len(stack), step):
            count = min(step, len(stack) - first)
            # What the student and the teacher are fed, before the second part of a block what the first part made.
            fed = {way: list(way.hidden) for way in (sparse, full)}
            for region, taught_by in zip(regions_at(size, sparse, first), regions_at(size, full, first), strict=True):

                def outputs(which, way, first=first, count=count, fed=fed):
                    return [which(x, c) for x, c in zip(fed[way], way.calls(first, count), strict=True)]

                found = outputs(region, full if mode == "DD" else sparse)[measured]
                targets = outputs(taught_by, sparse if mode == "SS" else full)[measured]
                wrong = sum((one - other).square().sum() for one, other in zip(found, targets, strict=True))
                errors.append(float((wrong / sum(target.square().sum() for target in targets)).sqrt()))
                if region.joins is None:
                    fed = {sparse: outputs(region, sparse), full: outputs(taught_by, full)}
            sparse.advance(first, count)
            full.advance(first, count)
    return errors

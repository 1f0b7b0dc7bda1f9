r"""Accuracy of a pruned ResNet, and what recovers it.

    python benchmarks/vision.py --weights resnet20-12fca82f.th --images cifar10_lossless_part.npz \
        --output benchmarks/results/vision-resnet20-cpu.json
    python benchmarks/vision.py --table --output (that file)
    python benchmarks/vision.py --plot docs/numbers/vision.png --output (that file)

The model is a CIFAR-10 ResNet-20, see benchmarks/vision_model.py. Accuracy is measured on 1,000 test images. All but
the last part prune by magnitude every convolution and the head, with one threshold for all of them, as PERP does
(Zimmer et al. 2023, arXiv:2312.15230, section 3.1). New statistics of the BatchNorms are then measured on the training
images, and retraining begins there. It trains in bfloat16 on the 4,000 training images with random flips and shifts.

The parts of the measurement:

- rates: three learning rates for each way of retraining, at 90 %, with seed 0: that which `find_learning_rate` finds,
  a third of it and three times it. The other parts use the best.
- ways: each way of retraining, for all sparsities.
- allocations: what divides 90 % among the layers.
- cycles: pruning once and in cycles, with the same number of epochs. SGD and the learning rates of "allr".
- freezing: two cycles in which blocks are frozen or unfrozen one after another, as in PERP's table 12.
- criteria: the convolutions of the blocks, pruned by each criterion with statistics of 256 training images.

Each row is written when it is measured, and a second run continues. `--images` names an .npz of x_train, y_train,
x_test, y_test, with images as uint8 (n, 32, 32, 3).
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_sparse import FreezingCallback, prune, reconstruct, sparsity
from peft_sparse.reconstruction import Fit
from vision_model import (
    BATCH,
    PRUNED,
    TRAINED,
    Augmented,
    accuracy,
    load,
    normalised,
    retrained,
    with_new_statistics,
)
from vision_table import plot, tables

from common import Rows, parser


RATES_AT = 0.9
# The original training of the model: 200 epochs of 391 steps of 128 images, with SGD from 0.1. PERP retrains with SGD
# too. The rate is divided by 4, because the batches are.
ORIGINAL = {
    "learning_rate": 0.025, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 1e-4, "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "original_steps": 200 * 391,
}  # fmt: skip
CALIBRATION = 256
PRUNED_NAMES = ["conv1", "conv2", "linear"]
# What prunes the convolutions of the blocks in the part "criteria", and its arguments.
CRITERIA: dict[str, dict[str, Any]] = {
    "magnitude, of each matrix": {},
    "magnitude, of the model": {"group": "model"},
    **{name: {"criterion": name} for name in ("wanda", "ria", "gblm", "sparsegpt")},
    "wanda, reconstructed": {"criterion": "wanda", "region": "block", "fit": Fit(learning_rate=1e-3, epochs=20)},
}
SETTINGS = {
    "model": "CIFAR-10 ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10",
    "training": "AdamW, batches of 32, bfloat16, warm-up of 10 %, then linear decay",
}


class Laboratory:
    """The images, the dense model and the rows. Each of the methods named in `PARTS` measures one part with one seed.

    Args:
        args: the arguments of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        with np.load(args.images) as file:
            self.images, self.test = normalised(file["x_train"]), normalised(file["x_test"])
            self.labels, self.test_labels = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
        self.data = Augmented(self.images, self.labels)
        self.dense = load(args.weights)
        counts = {"train": len(self.images), "test": len(self.test), "calibration": CALIBRATION}
        self.rows = Rows(args.output, {**SETTINGS, "images": counts, "epochs": args.epochs})
        # Several rows begin at the same model.
        self.pruned, self.renewed, self.by = cache(self._pruned), cache(self._renewed), cache(self._by)

    def add(self, case: dict[str, Any], work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Measure the model that `work` returns, unless there is a row of this case. It may return facts beside it."""
        if self.rows.find(**case):
            return
        started = time.process_time()
        result = work(*arguments, **options)
        seconds = time.process_time() - started
        model, facts = result if isinstance(result, tuple) else (result, {})
        found = {"accuracy": accuracy(model, self.test, self.test_labels), **facts, "cpu_seconds": seconds}
        self.rows.add({**case, **found, "reached": sparsity(model, PRUNED)})

    def _pruned(self, share: float, **options: Any) -> nn.Module:
        """Return the model, pruned by magnitude, with the statistics of the dense model."""
        model = copy.deepcopy(self.dense)
        prune(model, share, target_modules=PRUNED, **(options or {"group": "model"}))
        return model

    def _renewed(self, share: float, **options: Any) -> nn.Module:
        """Return the model, pruned by magnitude, with new statistics."""
        return with_new_statistics(self.pruned(share, **options), self.images)

    def _by(self, criterion: str, share: float, seed: int) -> nn.Module:
        """Return the model whose blocks are pruned as a name of `CRITERIA` says, with the statistics of the dense."""
        model = copy.deepcopy(self.dense)
        torch.manual_seed(seed)
        options = dict(CRITERIA[criterion])
        if "criterion" in options:
            batches = zip(self.images[:CALIBRATION].split(64), self.labels[:CALIBRATION].split(64), strict=True)
            options["calibration"] = [{"pixel_values": images, "labels": labels} for images, labels in batches]
        (reconstruct if "fit" in options else prune)(model, pattern=share, **options)
        return model

    def retrained(self, start: nn.Module, way: str, seed: int, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        options = {"num_train_epochs": self.args.epochs, **options}
        if "learning_rate" not in options:
            options["learning_rate"] = self.rate(way)
        result = retrained(start, way, self.data, seed=seed, **options)
        return result.model, {"trained_share": result.trained_share, "learning_rate": options["learning_rate"]}

    def rate(self, way: str) -> float:
        """Return the best learning rate that was tried for a way."""
        tried = [row for row in self.rows if row["part"] == "rates" and row["way"] == way]
        if not tried:
            raise SystemExit(f"No learning rate for {way!r} in {self.args.output}. Measure the part rates first.")
        return float(max(tried, key=lambda row: row["accuracy"])["learning_rate"])

    def rates(self, seed: int) -> None:
        for way in TRAINED if seed == 0 else ():
            case = {"part": "search", "sparsity": RATES_AT, "way": way}
            if not self.rows.find(**case):
                options: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-2, "find_learning_rate": True}
                trainer = retrained(self.renewed(RATES_AT), way, self.data, seed=seed, **options).trainer
                found = next(entry for entry in trainer.state.log_history if "found_learning_rate" in entry)
                self.rows.add({**case, "found": found["found_learning_rate"], "steps": found["search_steps"]})
            found_rate = self.rows.find(**case)["found"]  # type: ignore[index]
            for factor in (1.0, 1 / 3, 3.0):
                case = {"part": "rates", "sparsity": RATES_AT, "way": way, "factor": round(factor, 2)}
                self.add(case, self.retrained, self.renewed(RATES_AT), way, seed, learning_rate=factor * found_rate)

    def ways(self, seed: int) -> None:
        self.add({"part": "ways", "sparsity": 0.0, "way": "dense"}, lambda: self.dense)
        for share in self.args.sparsities:
            case = {"part": "ways", "sparsity": share}
            self.add({**case, "way": "pruned"}, self.pruned, share)
            self.add({**case, "way": "new statistics"}, self.renewed, share)
            for way in TRAINED:
                # This one gives no sparse model, and shows what the mask of the update costs at high sparsity.
                if way != "LoRA, not merged" or (seed == 0 and share >= 0.9):
                    self.add({**case, "way": way, "seed": seed}, self.retrained, self.renewed(share), way, seed)

    def allocations(self, seed: int) -> None:
        for name in ("uniform", "uniform+", "erk", "lamp", "global"):
            case = {"part": "allocations", "sparsity": 0.9, "allocation": name}
            self.add({**case, "way": "pruned"}, self.pruned, 0.9, allocation=name)
            self.add({**case, "way": "new statistics"}, self.renewed, 0.9, allocation=name)
            start = self.renewed(0.9, allocation=name)
            self.add({**case, "way": "MaskLoRA", "seed": seed}, self.retrained, start, "MaskLoRA", seed)

    def in_cycles(
        self, cycles: int, schedule: str, seed: int, freezing: FreezingCallback | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Prune and retrain all weights in cycles, with twice the epochs of the other parts together."""
        model, facts = self.retrained(
            self.dense, "all weights", seed, num_train_epochs=2 * self.args.epochs, sparsity=0.9, group="model",
            target_modules=PRUNED_NAMES, pruning_schedule="cycles", pruning_rounds=cycles,
            retraining_schedule=schedule, callbacks=[freezing] if freezing else None, **ORIGINAL,
        )  # fmt: skip
        if freezing:
            steps = int(2 * self.args.epochs * math.ceil(len(self.data) / BATCH))
            facts["aggregated_share"] = trained_on_average(self.dense, freezing, steps)
        return model, facts

    def cycles(self, seed: int) -> None:
        for cycles, schedule in ((1, "llr"), (1, "allr"), (2, "allr"), (4, "allr")):
            case = {"part": "cycles", "sparsity": 0.9, "cycles": cycles, "schedule": schedule, "seed": seed}
            self.add(case, self.in_cycles, cycles, schedule, seed)

    def freezing(self, seed: int) -> None:
        for mode, reverse in (("unfreeze", True), ("freeze", False), ("unfreeze", False), ("freeze", True)):
            case = {"part": "freezing", "sparsity": 0.9, "mode": mode, "reverse": reverse, "seed": seed}
            callback = FreezingCallback(mode, reverse=reverse, rounds=2)  # type: ignore[arg-type]
            self.add(case, self.in_cycles, 2, "allr", seed, callback)

    def criteria(self, seed: int) -> None:
        for share in (0.7, 0.9) if seed == self.args.seeds[0] else ():
            for name in CRITERIA:
                case = {"part": "criteria", "sparsity": share, "pruned_by": name}
                self.add({**case, "way": "pruned"}, self.by, name, share, seed)
                start = self.by(name, share, seed)
                self.add({**case, "way": "new statistics"}, with_new_statistics, start, self.images)


def trained_on_average(model: Any, callback: FreezingCallback, steps: int) -> float:
    """Return the trained share of the parameters, as a mean over the steps of a run."""
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    entries = sum(parameter.numel() for parameter in model.parameters())
    frozen = [sum(sizes[i] for i in callback.frozen(step, steps, len(sizes))) for step in range(steps)]
    return 1 - sum(frozen) / steps / entries


PARTS = ("rates", "ways", "allocations", "cycles", "freezing", "criteria")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", type=Path)
    options.add_argument("--images", type=Path)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    options.add_argument("--epochs", type=float, default=1)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--table", action="store_true", help="print the tables of an earlier run")
    options.add_argument("--plot", type=Path, help="draw the ways of an earlier run into this PNG")
    args = options.parse_args()
    if args.plot:
        plot(args.output, args.plot)
    elif args.table:
        print(tables(args.output))
    else:
        laboratory = Laboratory(args)
        for seed in args.seeds:
            for part in args.parts:
                getattr(laboratory, part)(seed)


if __name__ == "__main__":
    main()

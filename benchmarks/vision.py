r"""Accuracy of a pruned ResNet, and what recovers it.

    python benchmarks/vision.py --weights resnet20-12fca82f.th --images cifar10_lossless_part.npz \
        --output benchmarks/results/vision-resnet20-cpu.json
    python benchmarks/vision.py --table --output (that file)

The model is the CIFAR-10 ResNet-20 with BatchNorm of github.com/akamaster/pytorch_resnet_cifar10 (He et al. 2015,
arXiv:1512.03385, section 4.2, shortcuts of type A). Accuracy is measured on 1,000 test images. Each criterion prunes
the model to 70 and 90 %, with statistics of 256 training images. Each model is evaluated as it is, and again after
`torch.optim.swa_utils.update_bn` has measured the statistics of its BatchNorms on the training images. One model is
pruned by magnitude across all weights, as in PERP (Zimmer et al. 2023, arXiv:2312.15230, section 3.1). It is also
retrained: norms and biases alone, norms and biases with MaskLoRA or ScaledLoRA, and all weights. All of these take the
same number of epochs, with random flips and shifts.

`--images` names an .npz of x_train, y_train, x_test, y_test, with images as uint8 (n, 32, 32, 3).
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    environment,
    prune,
    reconstruct,
    sparsity,
)
from peft_sparse.reconstruction import Fit

from common import parser, write_json


MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128
# The best of three or four rates, a factor of three apart, for each way at 90 % after one epoch.
RATES = {"norms and biases": 3e-2, "MaskLoRA": 1e-2, "ScaledLoRA": 3e-2, "all weights": 1e-2}


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = width // width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            added = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added // 2, added // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(BasicBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        for block in self.blocks:
            x = block(x)
        logits = self.linear(x.mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def load(path: Path) -> ResNet20:
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    # The file has three stages of three blocks each. This class has one list of nine blocks.
    named = {}
    for name, value in state.items():
        parts = name.removeprefix("module.").split(".")
        if parts[0].startswith("layer"):
            parts = ["blocks", str(3 * (int(parts[0][5:]) - 1) + int(parts[1])), *parts[2:]]
        named[".".join(parts)] = value
    model.load_state_dict(named)
    return model.eval()


def normalised(images: np.ndarray) -> Tensor:
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


class Augmented(Dataset[dict[str, Tensor]]):
    """Training images with random flips and random shifts of up to four pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = F.pad(images, (4, 4, 4, 4)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        top, left, flip = torch.randint(0, 9, (3,)).tolist()
        image = self.images[index, :, top : top + 32, left : left + 32]
        return {"pixel_values": image.flip(-1) if flip % 2 else image, "labels": self.labels[index]}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of `images` that the model classifies correctly, in evaluation mode."""
    model.eval()
    guesses = torch.cat([model(pixel_values=batch)["logits"].argmax(-1) for batch in images.split(BATCH)])
    return float((guesses == labels).float().mean())


def with_new_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model` whose BatchNorm statistics are measured anew on `images`."""
    model = copy.deepcopy(model)
    update_bn(images.split(BATCH), model)
    return model


def retrained(model: nn.Module, way: str, data: Augmented, epochs: float, seed: int) -> nn.Module:
    """Retrain the pruned model in one of PERP's ways. Return the model, with adapters merged."""
    tuned: Any = model
    if way in ("MaskLoRA", "ScaledLoRA"):
        config: Any = MaskLoRAConfig if way == "MaskLoRA" else ScaledLoRAConfig
        tuned = get_peft_model(
            model, config(r=4, target_modules=r"blocks\..*conv\d|linear", train_norms=True, bias="all")
        )  # fmt: skip
    if way == "norms and biases":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bn" in name or name.endswith("bias"))
    with tempfile.TemporaryDirectory() as folder:
        args = SparseTrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATES[way],
            warmup_steps=0.1, report_to="none", save_strategy="no", seed=seed, logging_steps=1000,
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, label_names=["labels"],
        )  # fmt: skip
        SparseTrainer(tuned, args, train_dataset=data).train()
    return tuned.merge_and_unload() if tuned is not model else model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with np.load(args.images) as file:
        train, test = normalised(file["x_train"]), normalised(file["x_test"])
        train_labels, test_labels = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
    dense = load(args.weights)
    data = Augmented(train, train_labels)
    calibration = [
        {"pixel_values": images, "labels": labels}
        for images, labels in zip(train[:256].split(64), train_labels[:256].split(64), strict=True)
    ]
    rows: list[dict[str, Any]] = [{"pruned by": "", "accuracy": accuracy(dense, test, test_labels)}]

    def add(
        share: float, by: str, recovery: str, start: nn.Module, work: Callable[..., Any], **options: Any
    ) -> nn.Module:
        """Apply `work` to a copy of `start`, add a row for the model that results, and return that model."""
        torch.manual_seed(args.seed)
        model = copy.deepcopy(start)
        started = time.perf_counter()
        returned = work(model, **options)
        model = returned if isinstance(returned, nn.Module) else model
        row = {"pruned by": by, "sparsity": sparsity(model), "recovery": recovery, "wanted": share}
        row["seconds"] = time.perf_counter() - started
        row["accuracy"] = accuracy(model, test, test_labels)
        row["new statistics"] = accuracy(with_new_statistics(model, train), test, test_labels)
        rows.append(row)
        print(row, flush=True)
        return model

    for share in args.sparsities:
        add(share, "magnitude, of each matrix", "", dense, prune, pattern=share)
        for criterion in ("wanda", "ria", "gblm", "sparsegpt"):
            add(share, criterion, "", dense, prune, pattern=share, criterion=criterion, calibration=calibration)
        add(
            share, "wanda", "reconstructed", dense, reconstruct, pattern=share, criterion="wanda",
            calibration=calibration, region="block", fit=Fit(learning_rate=1e-3, epochs=20),
        )  # fmt: skip
        base = add(share, "magnitude, of the model", "", dense, prune, pattern=share, group="model")
        for way in RATES:
            options = {"way": way, "data": data, "epochs": args.epochs, "seed": args.seed}
            add(share, "magnitude, of the model", way, base, retrained, **options)
    return {
        "rows": rows,
        "model": "CIFAR-10 ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10",
        "images": {"train": len(train), "test": len(test), "calibration": 256},
        "epochs": args.epochs,
        "learning_rates": RATES,
        "seed": args.seed,
        "environment": environment(),
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows of `measure` as the table of docs/vision.md."""
    rows = result["rows"]
    shares = sorted({row["wanted"] for row in rows if "wanted" in row})
    head = [f"{share:.0%} | new statistics" for share in shares]
    lines = ["| pruned by | recovered by | " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * 2 * len(shares)]
    kinds = dict.fromkeys((row["pruned by"], row["recovery"]) for row in rows if "wanted" in row)
    for kind in kinds:
        cells = []
        for share in shares:
            row = next(
                r for r in rows if "wanted" in r and (r["pruned by"], r["recovery"], r["wanted"]) == (*kind, share)
            )
            cells += [f"{row['accuracy']:.1%}", f"{row['new statistics']:.1%}"]
        lines.append("| " + " | ".join([*kind, *cells]).replace("%", " %") + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", type=Path)
    options.add_argument("--images", type=Path)
    options.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.9])
    options.add_argument("--epochs", type=float, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--table", action="store_true", help="print the table of an earlier run")
    args = options.parse_args()
    if not args.table:
        write_json(args.output, measure(args))
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()

r"""Accuracy and speed of a ResNet whose filters were removed.

    python benchmarks/filters.py accuracy --weights resnet20-12fca82f.th --images cifar10_lossless_part.npz \
        --output benchmarks/results/filters-resnet20-cpu.json
    python benchmarks/filters.py speed --weights resnet20-12fca82f.th \
        --output benchmarks/results/filters-speed-cpu.json
    python benchmarks/filters.py table --output (one of these files)

The model is the CIFAR-10 ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10 (He et al. 2015, arXiv:1512.03385,
section 4.2). Its shortcuts pad channels, so the first convolution of each of its nine blocks loses filters, and the
other ten keep theirs. `accuracy` is measured on 1,000 test images: as pruned, and with the statistics of BatchNorm
taken anew on 4,000 training images. Compact models are measured again. `retraining`, with the same arguments and
another output, retrains the model from which half of the filters were removed by L1 norms.

`speed`: a dense, a masked and a compact model take turns on the same images. Each time is the processor time of one
pass, on one thread, and the ratio is the median over the rounds. Beside ResNet-20 it is that of
`ResNetForImageClassification` with the sizes of ResNet-18 and ResNet-50 and random weights, which have no accuracy.

`--images` names an .npz of x_train, y_train, x_test, y_test, with images as uint8 (n, 32, 32, 3).
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from peft_sparse import MaskLoRAConfig, SparseTrainer, SparseTrainingArguments, compact, prune_structured
from peft_sparse.structured.selection import Structure
from vision import Augmented, accuracy, load, normalised, with_new_statistics

from common import Rows, parser


RATIOS = (0.25, 0.5)
METRICS = ("l1", "l2", "fpgm", "bn_scale", "wanda")
STRUCTURES: dict[Structure, str] = {"ul-um": "each layer", "al-am": "the model"}
# Those of benchmarks/vision.py for single weights at 90 %. They were not searched again.
RATES = {"MaskLoRA and norms": 1e-2, "all weights": 1e-2}
# Sizes of `ResNetConfig`, and images per pass.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "ResNet-18": ({"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}, 4),
    "ResNet-50": ({"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}, 2),
}


class Images:
    """The images of the file, normalised."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.train, self.test = normalised(file["x_train"]), normalised(file["x_test"])
            labels = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
            self.train_labels, self.test_labels = labels

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test, self.test_labels)


def measure_accuracy(args: argparse.Namespace) -> None:
    images, dense = Images(args.images), load(args.weights)
    counts = {"train": len(images.train), "test": len(images.test), "calibration": 256}
    rows = Rows(args.output, {"images": counts, "seed": args.seed, "threads": 1})
    if not rows:
        rows.add({"metric": "", "accuracy": images.accuracy(dense), "parameters": size(dense)})
    calibration = [{"pixel_values": batch} for batch in images.train[:256].split(64)]
    for ratio, structure, metric in itertools.product(RATIOS, STRUCTURES, METRICS):
        if rows.find(ratio=ratio, compared=STRUCTURES[structure], metric=metric):
            continue
        model: nn.Module = copy.deepcopy(dense)
        report = prune_structured(model, ratio, calibration, metric=metric, structure=structure)
        row = {"metric": metric, "compared": STRUCTURES[structure], "ratio": ratio, "seconds": report.seconds}
        row["accuracy"] = images.accuracy(model)
        model = with_new_statistics(model, images.train)
        row["new statistics"] = images.accuracy(model)
        compact(model)
        rows.add(row | {"parameters": size(model), "compact": images.accuracy(model)})


def measure_retraining(args: argparse.Namespace) -> None:
    images = Images(args.images)
    settings = {"epochs": args.epochs, "learning_rates": RATES, "metric": "l1", "seed": args.seed, "threads": 1}
    rows = Rows(args.output, settings)
    masked: nn.Module = load(args.weights)
    prune_structured(masked, RATIOS[-1], metric="l1")
    masked = with_new_statistics(masked, images.train)
    for way in RATES:
        if not rows.find(recovery=way):
            torch.manual_seed(args.seed)
            data = Augmented(images.train, images.train_labels)
            model, seconds = retrained(copy.deepcopy(masked), way, data, args)
            row = {"ratio": RATIOS[-1], "recovery": way, "seconds": seconds, "accuracy": images.accuracy(model)}
            compact(model)
            rows.add(row | {"parameters": size(model), "compact": images.accuracy(model)})


def measure_speed(args: argparse.Namespace) -> None:
    dense: nn.Module = load(args.weights)
    rows = Rows(args.output, {"rounds": args.rounds, "seed": args.seed, "threads": 1})
    images = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(args.seed))
    for ratio in RATIOS:
        if not rows.find(speed_of="ResNet-20", ratio=ratio):
            rows.add({"speed_of": "ResNet-20", "ratio": ratio, **speeds(dense, ratio, images, args.rounds)})
        for name, (sizes, count) in SIZES.items():
            if not rows.find(speed_of=name, ratio=ratio):
                torch.manual_seed(args.seed)
                model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
                found = speeds(model, ratio, torch.randn(count, 3, 224, 224), args.rounds)
                rows.add({"speed_of": name, "ratio": ratio, **found})


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def retrained(model: nn.Module, way: str, data: Augmented, args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Retrain the masked model. Return it, with adapters merged, and the seconds that this took."""
    tuned: Any = model
    if way != "all weights":
        config: Any = MaskLoRAConfig(r=4, target_modules=r"blocks\..*conv\d|linear", train_norms=True, bias="all")
        tuned = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        options = SparseTrainingArguments(
            folder, num_train_epochs=args.epochs, per_device_train_batch_size=128, learning_rate=RATES[way],
            warmup_steps=0.1, report_to="none", save_strategy="no", seed=args.seed, logging_steps=1000,
            use_cpu=True, dataloader_pin_memory=False, label_names=["labels"],
        )  # fmt: skip
        started = time.perf_counter()
        SparseTrainer(tuned, options, train_dataset=data).train()
    return (tuned.merge_and_unload() if tuned is not model else model), time.perf_counter() - started


def speeds(dense: nn.Module, ratio: float, images: Tensor, rounds: int) -> dict[str, Any]:
    """Return the processor time of the three models, and the ratios to the dense one in the same round."""
    masked = copy.deepcopy(dense)
    report = prune_structured(masked, ratio, [{"pixel_values": images[:1]}], metric="l1")
    models = {"dense": dense, "masked": masked, "compact": compact(copy.deepcopy(masked))}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, model in models.items():
                started = time.process_time()
                model(pixel_values=images)
                if number:  # the first round warms up
                    times[name].append(time.process_time() - started)
    faster = {
        f"{name}, times faster": median(one / own for one, own in zip(times["dense"], times[name], strict=True))
        for name in ("masked", "compact")
    }
    seconds = {f"{name}, seconds": median(values) for name, values in times.items()}
    counts = {"parameters": size(dense), "compact, parameters": size(models["compact"])}
    return {**counts, **seconds, **faster, "images": len(images), "convolutions left out": len(report.left_out)}


def table(result: dict[str, Any]) -> str:
    """Return the rows of a result as a table of docs/methods/filters.md."""
    rows = result["rows"]
    if "speed_of" in rows[0]:
        return speed_table(rows)
    if "recovery" in rows[0]:
        cells = [f"| {row['recovery']} | {100 * row['accuracy']:.1f} % |" for row in rows]
        return "\n".join(["| retrained | accuracy |", "| --- | ---: |", *cells])
    lines = ["| metric | compared | 25 % | new statistics | 50 % | new statistics |", "| --- | --- |" + " ---: |" * 4]
    for compared in STRUCTURES.values():
        for metric in METRICS:
            own = [row for row in rows if row.get("compared") == compared and row["metric"] == metric]
            cells = [f"{100 * row[key]:.1f} %" for row in own for key in ("accuracy", "new statistics")]
            lines.append(f"| `{metric}` | {compared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | filters removed | parameters | masked | compact |", "| --- |" + " ---: |" * 4]
    for row in rows:
        counts = f"{row['parameters'] / 1e6:.2f} M → {row['compact, parameters'] / 1e6:.2f} M"
        ratios = f"{row['masked, times faster']:.2f} | {row['compact, times faster']:.2f}"
        lines.append(f"| {row['speed_of']} | {row['ratio']:.0%} | {counts} | {ratios} |".replace("% |", " % |", 1))
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=("accuracy", "retraining", "speed", "table"))
    options.add_argument("--weights", type=Path)
    options.add_argument("--images", type=Path)
    options.add_argument("--epochs", type=float, default=1)
    options.add_argument("--rounds", type=int, default=7, help="of the measurement of speed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True)
    args = options.parse_args()
    torch.set_num_threads(1)
    parts = {"accuracy": measure_accuracy, "retraining": measure_retraining, "speed": measure_speed}
    if args.part in parts:
        parts[args.part](args)
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()

r"""Accuracy and speed of a ResNet whose filters were removed.

    python benchmarks/filters.py --weights resnet20-12fca82f.th --images cifar10_lossless_part.npz \
        --output benchmarks/results/filters-resnet20-cpu.json
    python benchmarks/filters.py --table --output (that file)

The model is the CIFAR-10 ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10 (He et al. 2015, arXiv:1512.03385,
section 4.2). Its shortcuts pad channels, so the first convolution of each of its nine blocks loses filters, and the
other ten keep theirs. Accuracy is measured on 1,000 test images: as pruned, and with the statistics of BatchNorm taken
anew on 4,000 training images. Two rows are also retrained, and compact models are measured again.

Speed: a dense, a masked and a compact model take turns on the same images. Each time is the processor time of one
pass, on one thread, and the ratio is the median over the rounds. Beside ResNet-20 it is that of
`ResNetForImageClassification` with the sizes of ResNet-18 and ResNet-50 and random weights, which have no accuracy.

`--images` names an .npz of x_train, y_train, x_test, y_test, with images as uint8 (n, 32, 32, 3).
"""

import argparse
import copy
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
from vision import Augmented, accuracy, load, normalised, with_new_statistics

from common import Rows, parser


RATIOS = (0.25, 0.5)
METRICS = ("l1", "l2", "fpgm", "bn_scale", "wanda")
STRUCTURES = {"ul-um": "each layer", "al-am": "the model"}
# Those of benchmarks/vision.py for single weights at 90 %. They were not searched again.
RATES = {"MaskLoRA and norms": 1e-2, "all weights": 1e-2}
# Sizes of `ResNetConfig`, and images per pass.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "ResNet-18": ({"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}, 4),
    "ResNet-50": ({"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}, 2),
}


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with np.load(args.images) as file:
        train, test = normalised(file["x_train"]), normalised(file["x_test"])
        train_labels, test_labels = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
    dense: nn.Module = load(args.weights)
    images = {"train": len(train), "test": len(test), "calibration": 256}
    settings = {"images": images, "epochs": args.epochs, "learning_rates": RATES, "seed": args.seed, "threads": 1}
    rows = Rows(args.output, settings)
    if not rows:
        rows.add({"metric": "", "accuracy": accuracy(dense, test, test_labels), "parameters": size(dense)})
    calibration = [{"pixel_values": batch} for batch in train[:256].split(64)]
    for ratio in RATIOS:
        for structure, compared in STRUCTURES.items():
            for metric in METRICS:
                if rows.find(ratio=ratio, compared=compared, metric=metric):
                    continue
                model = copy.deepcopy(dense)
                report = prune_structured(model, ratio, calibration, metric=metric, structure=structure)  # type: ignore[arg-type]
                row = {"metric": metric, "compared": compared, "ratio": ratio, "seconds": report.seconds}
                row["accuracy"] = accuracy(model, test, test_labels)
                model = with_new_statistics(model, train)
                row["new statistics"] = accuracy(model, test, test_labels)
                rows.add(row | cut(model, test, test_labels))
    data = Augmented(train, train_labels)
    for way in RATES:
        for ratio in RATIOS:
            if not rows.find(ratio=ratio, recovery=way):
                model = copy.deepcopy(dense)
                prune_structured(model, ratio, metric="l1")
                model, seconds = retrained(with_new_statistics(model, train), way, data, args)
                row = {"metric": "l1", "ratio": ratio, "recovery": way, "seconds": seconds}
                row["accuracy"] = accuracy(model, test, test_labels)
                rows.add(row | cut(model, test, test_labels))
    for ratio in RATIOS:
        if not rows.find(speed_of="ResNet-20", ratio=ratio):
            rows.add({"speed_of": "ResNet-20", "ratio": ratio, **speeds(dense, ratio, test[:128], args.rounds)})
        for name, (sizes, count) in SIZES.items():
            if not rows.find(speed_of=name, ratio=ratio):
                torch.manual_seed(args.seed)
                model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
                found = speeds(model, ratio, torch.randn(count, 3, 224, 224), args.rounds)
                rows.add({"speed_of": name, "ratio": ratio, **found})


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cut(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the number of parameters and the accuracy of the compact model."""
    compact(model)
    return {"parameters": size(model), "compact": accuracy(model, images, labels)}


def retrained(model: nn.Module, way: str, data: Augmented, args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Retrain the masked model. Return it, with adapters merged, and the seconds that this took."""
    torch.manual_seed(args.seed)
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
    """Return the rows of `measure` as the tables of docs/methods/filters.md."""
    rows = result["rows"]
    lines = ["| metric | compared | 25 % | new statistics | 50 % | new statistics |", "| --- | --- |" + " ---: |" * 4]
    for compared in STRUCTURES.values():
        for metric in METRICS:
            own = [row for row in rows if row.get("compared") == compared and row["metric"] == metric]
            cells = [f"{100 * row[key]:.1f} %" for row in own for key in ("accuracy", "new statistics")]
            lines.append(f"| `{metric}` | {compared} | {' | '.join(cells)} |")
    for way in RATES:
        own = [row for row in rows if row.get("recovery") == way]
        lines.append(
            f"| `l1`, retrained: {way} | each layer | " + "".join(f"| {100 * r['accuracy']:.1f} % |" for r in own)
        )
    lines += ["", "| model | filters removed | parameters | masked | compact |", "| --- |" + " ---: |" * 4]
    for row in (row for row in rows if "speed_of" in row):
        counts = f"{row['parameters'] / 1e6:.2f} M → {row['compact, parameters'] / 1e6:.2f} M"
        ratios = f"{row['masked, times faster']:.2f} | {row['compact, times faster']:.2f}"
        lines.append(f"| {row['speed_of']} | {row['ratio']:.0%} | {counts} | {ratios} |".replace("% |", " % |", 1))
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", type=Path)
    options.add_argument("--images", type=Path)
    options.add_argument("--epochs", type=float, default=1)
    options.add_argument("--rounds", type=int, default=7, help="of the measurement of speed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--table", action="store_true", help="print the tables of an earlier run")
    args = options.parse_args()
    if not args.table:
        measure(args)
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()

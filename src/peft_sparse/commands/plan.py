"""`peft-sparse plan`: tells how much memory and time a run will take, before a weight is loaded."""

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch

from ..planning import plan_pruning, plan_reconstruction, plan_training
from ..planning.training import Strategy
from ..recipes import AdapterArguments, TextArguments
from ..reconstruction import Fit
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields, check_pruned, parsed
from .sources import MODEL, SourceArguments, configuration, own_model
from .story import prepare, say


SUMMARY: str = "Tell how much memory a run will take, from the configuration of the model alone."
EXAMPLE: str = "peft-sparse plan --model Qwen/Qwen2.5-0.5B --sparsity 0.5 --criterion sparsegpt"

DEFAULTS: dict[str, Any] = {"sequence_length": 512, "calibration_length": 512}
STAGES = ("pruning", "reconstruction", "retraining")


@dataclass
class PlanArguments:
    """What is planned, and on how many devices."""

    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": f"What to plan: {', '.join(STAGES)}. Default: all."}
    )
    strategy: Strategy = field(default="ddp", metadata={"help": "How devices share the retraining."})
    devices: int = field(default=1, metadata={"help": "Number of devices."})

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"`stages` must be of {', '.join(map(repr, STAGES))}, got {stage!r}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse plan`."""
    training = SparseTrainingArguments
    add_fields(parser, SourceArguments, {"the model": MODEL})
    add_fields(parser, PlanArguments, {"what to plan": ("stages", "strategy", "devices")})
    add_fields(parser, training, {"to what sparsity": groups.SPARSITY, "pruning": groups.PRUNING})
    add_fields(parser, TextArguments, {"the text": ("sequence_length", "calibration_length")}, DEFAULTS)
    regions = ("reconstruction_region", "reconstruction_loss", "reconstruction_batch_size", "activations")
    add_fields(parser, training, {"reconstruction": regions})
    add_fields(parser, AdapterArguments, {"the adapter of retraining": ("adapter", "r", "train_norms", "bias")})
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16")
    add_fields(parser, training, {"retraining": batch}, {"per_device_train_batch_size": 1})


def run(args: argparse.Namespace) -> list[str]:
    """Print the plans for the model of `args`. Nothing is written."""
    values = {"per_device_train_batch_size": 1, "report_to": "none", "use_cpu": True} | DEFAULTS | vars(args)
    kinds = (SourceArguments, PlanArguments, TextArguments, AdapterArguments, SparseTrainingArguments)
    sources, plan, text, adapter, options = parsed({"output_dir": "unused"} | values, *kinds)
    name = own_model(sources)
    configuration(name)
    if {"pruning", "reconstruction"} & set(plan.stages):
        check_pruned(options)
    prepare()
    calibration = {"sequences": options.calibration_samples, "length": text.calibration_length}
    calibration |= {"activations": options.activations}
    autocast = torch.bfloat16 if options.bf16 else None
    if "pruning" in plan.stages:
        say(f"pruning\n{plan_pruning(name, **options.pruning_options(), **calibration)}\n")
    if "reconstruction" in plan.stages:
        planned = plan_reconstruction(
            name,
            **options.pruning_options(),
            **calibration,
            batch_size=options.batch_of_regions(),
            region=options.region_size(),
            fit=Fit(loss=options.reconstruction_loss, autocast=autocast),
        )
        say(f"reconstruction\n{planned}\n")
    if "retraining" in plan.stages:
        trained = plan_training(
            name,
            adapter.config(),
            batch_size=options.per_device_train_batch_size,
            length=text.sequence_length,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            activation_checkpointing=options.gradient_checkpointing,
            autocast=autocast,
            strategy=plan.strategy,
            devices=plan.devices,
        )
        say(f"retraining\n{trained}")
    return []

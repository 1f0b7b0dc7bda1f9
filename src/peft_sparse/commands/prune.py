"""`peft-sparse prune`: writes zeros into a model and saves it."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration.text import pack_sequences
from ..pruning.criteria import find_criterion
from ..pruning.prune import prune
from ..training.arguments import SparseTrainingArguments
from .arguments import add_fields, parsed
from .outcome import BadArguments, begin_work
from .sources import SourceArguments, load_documents, load_model


SUMMARY: str = "Prune a model to a sparsity or to n:m, and save it."
EXAMPLE: str = "peft-sparse prune --model Qwen/Qwen2.5-0.5B --sparsity 0.5 --criterion wanda --text_file text.txt"

PRUNING = ("criterion", "criterion_options", "group", "allocation", "allocation_options", "refinement",
           "refinement_options", "update", "update_options", "target_modules", "exclude_modules")  # fmt: skip
TEXT = ("text_file", "dataset_name", "dataset_config", "dataset_split", "text_column", "max_documents")


@dataclass
class CalibrationArguments:
    """How much text calibration reads."""

    calibration_length: int = field(default=512, metadata={"help": "Tokens in a sequence of calibration."})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse prune`."""
    add_fields(parser, SourceArguments, {"what to prune": ("model_name_or_path",)})
    add_fields(parser, SparseTrainingArguments, {"to what sparsity": ("sparsity", "pattern"), "how": PRUNING})
    add_fields(parser, SourceArguments, {"the text of calibration": TEXT})
    add_fields(parser, CalibrationArguments, {"how much of it": ("calibration_length",)})
    add_fields(parser, SparseTrainingArguments, {"the run": ("calibration_samples", "activations", "seed", "use_cpu")})
    add_fields(parser, SparseTrainingArguments, {"where to": ("output_dir",)}, {"output_dir": "pruned"})


def run(args: argparse.Namespace) -> list[str]:
    """Prune the model of `args`, save it, and return what was written."""
    values = {"output_dir": "pruned", "report_to": "none"} | vars(args)
    sources, length, options = parsed(values, SourceArguments, CalibrationArguments, SparseTrainingArguments)
    pruning = options.pruning_options()
    if pruning["pattern"] is None:
        raise BadArguments('A sparsity is needed. Give --sparsity 0.5, or --pattern "2:4".')
    model, tokenizer = load_model(sources)
    calibration = _calibration(sources, options, length.calibration_length, tokenizer)
    model.to(options.device)
    report = prune(model, calibration=calibration, activations=options.activations, **pruning)
    begin_work()
    output = Path(options.output_dir)
    model.save_pretrained(output / "sparse")
    tokenizer.save_pretrained(output / "sparse")
    (output / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return [str(output / "sparse"), str(output / "report.json")]


def _calibration(sources: Any, options: Any, length: int, tokenizer: Any) -> torch.Tensor | None:
    measures = find_criterion(options.criterion)[1].needs or options.allocation or options.refinement or options.update
    if not measures and sources.text_file is None and sources.dataset_name is None:
        return None
    sequences = pack_sequences(load_documents(sources)[0], tokenizer, length)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(options.seed))
    return sequences[order[: options.calibration_samples]]

"""`peft-sparse prune`: writes zeros into a model and saves it."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pruning.allocation import find_allocation
from ..pruning.checkpoint import prune_checkpoint
from ..pruning.criteria import find_criterion
from ..pruning.prune import prune
from ..recipes import TextArguments
from ..reporting import write_report
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields, check_pruned, parsed
from .outcome import begin_work
from .sources import (
    MODEL,
    TEXT,
    SourceArguments,
    calibration_sequences,
    check_lengths,
    check_output,
    in_turn,
    load_documents,
    load_model,
    load_tokenizer,
    own_model,
    tell_model,
)
from .story import prepare, say


SUMMARY: str = "Prune a model to a sparsity or to n:m, and save it."
EXAMPLE: str = "peft-sparse prune --model Qwen/Qwen2.5-0.5B --sparsity 0.5 --criterion wanda --text_file text.txt"

DEFAULTS: dict[str, Any] = {"output_dir": "pruned", "report_to": "none", "calibration_length": 512}


@dataclass
class StreamArguments:
    """How the weights are held."""

    stream: bool = field(
        default=False,
        metadata={"help": "Read, prune and write one block at a time, for models larger than memory."},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse prune`."""
    training = SparseTrainingArguments
    add_fields(parser, SourceArguments, {"the model": MODEL})
    add_fields(parser, training, {"to what sparsity": groups.SPARSITY, "how": groups.PRUNING})
    add_fields(parser, SourceArguments, {"the text of calibration": TEXT})
    add_fields(parser, TextArguments, {"how much of it": ("calibration_length",)}, DEFAULTS)
    add_fields(parser, StreamArguments, {"memory": ("stream",)})
    add_fields(parser, training, {"the run": (*groups.RUN, "activations")}, DEFAULTS)


def run(args: argparse.Namespace) -> list[str]:
    """Prune the model of `args`, save it, and return what was written."""
    values = DEFAULTS | vars(args)
    kinds = (SourceArguments, TextArguments, StreamArguments, SparseTrainingArguments)
    sources, text, memory, options = parsed(values, *kinds)
    check_pruned(options)
    output, source = Path(options.output_dir), own_model(sources)
    check_output(str(output), "sparse", source=source)
    prepare()
    model: Any = None
    if memory.stream:
        calibration = _calibration(sources, options, text, load_tokenizer(source))
        say(f"pruning {source} block by block to {options.pruning_pattern()} by {options.criterion}")
        report = prune_checkpoint(
            source,
            output / "sparse",
            calibration=calibration,
            activations=options.activations if "activations" in values else "cpu",
            device=options.device,
            **options.pruning_options(),
        )
    else:
        model, tokenizer = load_model(source)
        calibration = _calibration(sources, options, text, tokenizer)
        if calibration is not None:
            check_lengths(model, calibration_length=text.calibration_length)
        tell_model(sources, model, options.device)
        say(f"pruning to {options.pruning_pattern()} by {options.criterion}")
        model.to(options.device)
        report = prune(model, calibration=calibration, activations=options.activations, **options.pruning_options())
        begin_work()
        if options.should_save:
            model.save_pretrained(output / "sparse")
            tokenizer.save_pretrained(output / "sparse")
    say(f"\n{report}\n")
    written = []
    if options.should_save:
        known = {} if model is None else {"model": model, "saved": "sparse"}
        written = [str(path) for path in write_report(report, output, **known)]
    return [f"{output / 'sparse'} (load it by AutoModelForCausalLM.from_pretrained)", *written]


def _calibration(sources: SourceArguments, options: Any, text: TextArguments, tokenizer: Any) -> Tensor | None:
    """Return the sequences of calibration; None if no text is given, and none is needed."""
    needs = find_criterion(options.criterion)[1].needs
    if options.allocation:
        needs += find_allocation(options.allocation)[1].needs
    if not (sources.has_text or needs or options.refinement or options.update):
        return None
    documents = in_turn(lambda: load_documents(sources))
    chosen = calibration_sequences(documents, tokenizer, text, options)
    say(f"calibration: {documents.name}, {len(chosen)} sequences of {text.calibration_length} tokens")
    return chosen

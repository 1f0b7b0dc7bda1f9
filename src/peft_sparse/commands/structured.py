"""`peft-sparse structured`: removes whole heads, neurons or experts, and saves the smaller model."""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..recipes import TextArguments
from ..reporting import write_report
from ..structured import compact, prune_structured
from ..structured.metrics import METRICS
from ..training.arguments import SparseTrainingArguments
from . import groups
from .arguments import add_fields, parsed
from .outcome import BadArguments, begin_work
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
    own_model,
    tell_model,
)
from .story import prepare, say


SUMMARY: str = "Remove whole heads, neurons or experts, and cut them out of the model."
EXAMPLE: str = "peft-sparse structured --model Qwen/Qwen2.5-0.5B --ratio 0.2 --text_file text.txt"

DEFAULTS: dict[str, Any] = {"output_dir": "compact", "report_to": "none", "calibration_length": 512}


@dataclass
class StructuredArguments:
    """What is removed: the arguments of `prune_structured`."""

    ratio: float | None = field(
        default=None, metadata={"help": "Fraction of the parameters, or of the experts, to remove, in [0, 1)."}
    )
    metric: str = field(
        default="wifv", metadata={"help": f"How units are scored: {', '.join(METRICS)}, or reap for experts."}
    )
    structure: str | None = field(
        default=None,
        metadata={"help": 'Units that are compared: "al-am", "al-mm", "ul-mm", "ul-um". Default: that of the paper.'},
    )
    attention_ratio: float | None = field(
        default=None, metadata={"help": 'The largest fraction of the heads to remove, for "al-mm" and "ul-mm".'}
    )
    compensate: bool | None = field(
        default=None, metadata={"help": "Put the mean output in the place of what is removed. Default: for heads."}
    )
    compact: bool = field(
        default=True, metadata={"help": "Cut out what is removed. Otherwise it stays in the model as zeros."}
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse structured`."""
    training = SparseTrainingArguments
    own = ("ratio", "metric", "structure", "attention_ratio", "compensate", "compact")
    add_fields(parser, SourceArguments, {"the model": MODEL})
    add_fields(parser, StructuredArguments, {"what to remove": own})
    add_fields(parser, training, {"from which layers": ("target_modules", "exclude_modules")})
    add_fields(parser, SourceArguments, {"the text of calibration": TEXT})
    add_fields(parser, TextArguments, {"how much of it": ("calibration_length",)}, DEFAULTS)
    add_fields(parser, training, {"the run": ("calibration_samples", *groups.RUN, "activations")}, DEFAULTS)


def run(args: argparse.Namespace) -> list[str]:
    """Remove units from the model of `args`, save it, and return what was written."""
    kinds = (SourceArguments, StructuredArguments, TextArguments, SparseTrainingArguments)
    sources, chosen, text, options = parsed(DEFAULTS | vars(args), *kinds)
    if chosen.ratio is None:
        raise BadArguments("A ratio is needed. Give --ratio 0.2 to remove a fifth of the parameters.")
    source = own_model(sources)
    check_output(str(options.output_dir), "compact", source=source)
    prepare()
    model, tokenizer = load_model(source)
    calibration = _calibration(sources, options, text, tokenizer) if _needs_text(sources, chosen) else None
    if calibration is not None:
        check_lengths(model, calibration_length=text.calibration_length)
    tell_model(sources, model, options.device)
    asked = asdict(chosen)
    cut, ratio = asked.pop("compact"), asked.pop("ratio")
    model.to(options.device)
    targets = {"target_modules": options.target_modules, "exclude_modules": options.exclude_modules}
    report = prune_structured(model, ratio, calibration, activations=options.activations, **asked, **targets)
    begin_work()
    if cut and chosen.metric != "reap":
        say("cutting out what was removed")
        compact(model, None if calibration is None else calibration[:1])
    say(f"\n{report}\n")
    output = Path(str(options.output_dir))
    files: list[str] = []
    if options.should_save:
        model.save_pretrained(output / "compact")
        tokenizer.save_pretrained(output / "compact")
        files = [str(path) for path in write_report(report, output, model=model, saved="compact")]
    # Layers of unequal width need a class of this package, see `compact`.
    first = "" if type(model).__module__.startswith("transformers.") else ", after `import peft_sparse`"
    loading = f"load it by AutoModelForCausalLM.from_pretrained{first}"
    return [f"{output / 'compact'} ({loading})", *files]


def _needs_text(sources: SourceArguments, chosen: StructuredArguments) -> bool:
    """Return whether a text is given, or needed by the metric or for the mean of what is removed."""
    measures = chosen.metric not in METRICS or METRICS[chosen.metric].needs_inputs
    return sources.has_text or measures or chosen.compensate is not False


def _calibration(sources: SourceArguments, options: Any, text: TextArguments, tokenizer: Any) -> Tensor:
    return calibration_sequences(in_turn(lambda: load_documents(sources)), tokenizer, text, options)

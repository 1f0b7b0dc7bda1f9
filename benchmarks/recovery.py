r"""What each tuner recovers after pruning, at equal data and steps: loss by step, perplexity before and after merging.

    python benchmarks/recovery.py --steps 30 --sequence_length 256 \
        --output benchmarks/results/recovery-smollm2-cpu.json

Half of the weights of SmolLM2-135M-Instruct are pruned by magnitude. The adapters alone are trained, on the text of
examples/demo.py. Their rank is 16, unless the row names another. The learning rate is 2e-3 for additive updates, and
1e-2 for multiplicative updates, because these move a weight in proportion to its size. After 10 % of warm-up the
learning rate falls linearly. The optimiser is AdamW without weight decay.
"""

import time
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from peft_sparse import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    environment,
    pack_sequences,
    perplexity,
    prune,
    sparsity,
)

from common import digest, parser, python_documents, smollm2_dir, write_json


ADDITIVE, MULTIPLICATIVE = 2e-3, 1e-2


def variants() -> dict[str, tuple[PeftConfig, float]]:
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 16}
    mask: dict[str, Any] = common | {"lora_alpha": 32}
    return {
        "MaskLoRA": (MaskLoRAConfig(**mask), ADDITIVE),
        "LoRA-Prune": (MaskLoRAConfig(**mask, masking="merge"), ADDITIVE),
        "ScaledLoRA": (ScaledLoRAConfig(**common), MULTIPLICATIVE),
        "ScaledLoRA, residual=False": (ScaledLoRAConfig(**common, residual=False), MULTIPLICATIVE),
        'ScaledLoRA, init "paper"': (ScaledLoRAConfig(**common, init_weights="paper"), MULTIPLICATIVE),
        "ScaledLoRA, rank 1": (ScaledLoRAConfig(**(common | {"r": 1})), MULTIPLICATIVE),
        "HiRA (PEFT)": (HiraConfig(**common), MULTIPLICATIVE),
    }


def recover(
    config: PeftConfig, rate: float, train: torch.Tensor, evaluation: torch.Tensor, steps: int
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    prune(model, 0.5)
    set_seed(0)
    model = get_peft_model(model, config)
    args = SparseTrainingArguments(
        "recovery-output",
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=0.1,
        weight_decay=0.0,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=0,
    )
    samples = [{"input_ids": row, "labels": row} for row in train]
    trainer = SparseTrainer(model, args, train_dataset=samples, data_collator=default_data_collator)
    started = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - started) / steps
    unmerged = perplexity(model, evaluation)
    merged = model.merge_and_unload()
    return {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "perplexity": unmerged,
        "merged_perplexity": perplexity(merged, evaluation),
        "merged_sparsity": sparsity(merged),
        "seconds_per_step": seconds,
        "learning_rate": rate,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--sequence_length", type=int, default=512)
    options.add_argument("--output", type=Path)
    arguments = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    texts = python_documents()
    train = pack_sequences(texts[0], tokenizer, arguments.sequence_length)
    evaluation = pack_sequences(texts[1], tokenizer, arguments.sequence_length)[:8]
    result: dict[str, Any] = {
        "settings": {"steps": arguments.steps, "sequence_length": arguments.sequence_length, "seed": 0},
        "text": {"train": digest(texts[0]), "evaluation": digest(texts[1])},
        "runs": {},
    }
    for name, (config, rate) in variants().items():
        result["runs"][name] = run = recover(config, rate, train, evaluation, arguments.steps)
        print(
            f"| {name} | {run['perplexity']:.2f} | {run['merged_perplexity']:.2f} | {run['seconds_per_step']:.2f} s |"
        )
        if arguments.output:
            result["environment"] = environment()
            write_json(arguments.output, result)


if __name__ == "__main__":
    main()

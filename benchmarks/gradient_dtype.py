r"""What eight bits for dL/dW change in retraining: loss by step and perplexity with each `gradient_dtype`.

    python benchmarks/gradient_dtype.py --model FOLDER --text-file tinystories-sample.txt.gz --batch_size 4 \
        --steps 100 --seeds 5 --output benchmarks/results/gradient-dtype-stories260k-cpu.json
    python benchmarks/gradient_dtype.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz \
        --rank 16 --length 256 --batch_size 1 --windows 4 --window 1024 --rate 0.002 --seeds 3 --kinds none int8 \
        --output benchmarks/results/gradient-dtype-smollm2-cpu.json

Half of the weights are pruned by magnitude, and MaskLoRA adapters alone are trained with AdamW. After 10 % of warm-up
the rate falls linearly. A seed sets A and the order of the sequences, so that the runs of one seed differ in the
rounding of dL/dW alone. On a CPU, fp8 is multiplied in eight bits too here. The package would not do it, because this
takes longer than float32. What counts here is the loss.
"""

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_sparse import MaskLoRAConfig, pack_sequences, perplexity, prune
from peft_sparse.tuners import eight_bit

from common import Rows, add_text_arguments, described, documents, parser, smollm2_dir


def texts(args: argparse.Namespace) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return sequences for training, windows for evaluation, and what describes them."""
    tokenizer = AutoTokenizer.from_pretrained(args.model or smollm2_dir())
    if args.text_file:
        with gzip.open(args.text_file, "rt", encoding="utf-8") as file:
            whole = file.read()
        cut = len(whole) * 85 // 100
        train, held_out = [whole[:cut]], whole[cut:]
    else:
        train, held_out = documents(args)
    sequences = pack_sequences(train, tokenizer, args.length)[: args.sequences]
    windows = pack_sequences([held_out], tokenizer, args.window, separator="")[: args.windows]
    settings = described(args, train, held_out, sequences, windows)
    for part in ("calibration", "evaluation") if args.text_file else ():
        settings[part]["name"] = Path(args.text_file).name
    return sequences, windows, settings


def retrain(model: Any, kind: Any, args: argparse.Namespace, sequences: Tensor, seed: int) -> list[float]:
    """Train `model`, which has been pruned, and return the loss of every step."""
    set_seed(seed)
    config = MaskLoRAConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", gradient_dtype=kind, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), args.rate, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    needed = args.steps * args.batch_size
    epochs = -(-needed // len(sequences))
    order = torch.cat([torch.randperm(len(sequences), generator=generator) for _ in range(epochs)])
    losses = []
    for indices in order[:needed].view(args.steps, args.batch_size):
        ids = sequences[indices].to(adapted.device)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss))
    return losses


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="folder of the model; SmolLM2-135M-Instruct if left out")
    options.add_argument("--text-file", help="gzipped text, of which the last 15 %% are for evaluation")
    add_text_arguments(options)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--sequences", type=int, default=2000)
    options.add_argument("--batch_size", type=int, default=4)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--windows", type=int, default=48)
    options.add_argument("--window", type=int, default=128)
    options.add_argument("--rate", type=float, default=0.01)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--kinds", nargs="+", default=["none", "int8", "fp8"], choices=["none", "int8", "fp8"])
    options.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--output", type=Path, required=True)
    args = options.parse_args()
    sequences, windows, settings = texts(args)
    settings |= {name: getattr(args, name) for name in ("rank", "steps", "batch_size", "rate")}
    if args.model:
        settings["model"] = Path(args.model).parent.name
    rows = Rows(args.output, settings)
    # Numbers of fp8 are multiplied wherever integers would be, also on a CPU.
    ask = eight_bit._multiplies
    eight_bit._multiplies = lambda values, D: ask(values.view(torch.int8), D)
    for seed in range(args.seeds):
        for kind in args.kinds:
            if rows.find(seed=seed, gradient_dtype=kind):
                continue
            model = AutoModelForCausalLM.from_pretrained(args.model or smollm2_dir())
            prune(model, 0.5)
            began = time.process_time()
            losses = retrain(model, None if kind == "none" else kind, args, sequences, seed)
            row = {"seed": seed, "gradient_dtype": kind, "cpu_seconds": time.process_time() - began, "losses": losses}
            rows.add({**row, "perplexity": perplexity(model, windows)})


if __name__ == "__main__":
    main()

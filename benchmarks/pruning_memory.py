"""Memory and time of pruning SmolLM2-135M-Instruct, against the loop that published code runs. One process per run.

    python benchmarks/pruning_memory.py --output benchmarks/results/pruning-memory-smollm2-cpu.json
    python benchmarks/pruning_memory.py --lengths 2048 --repeats 1 --output (the same file, to add rows to it)
    python benchmarks/pruning_memory.py batches --output benchmarks/results/pruning-batches-smollm2-cpu.json

The published side is written from the papers and keeps the structure of the published loops (arXiv:2306.11695 and
arXiv:2301.00774): two buffers hold the hidden states of all sequences before and after a block, the block runs
sequence by sequence with a hook on every layer, each layer has its own norms (Wanda) or its own Hessian (SparseGPT),
and the block runs again on its pruned weights. It measures no output errors and proves nothing. Both sides get the
same tokens, the same loaded model and one sequence at a time.

Memory above the model is the peak of resident memory during pruning, less the resident memory after a forward pass of
the loaded model. Both are what Linux says of the process. The C library keeps up to 64 MiB of freed memory, by chance
more or less of it, so rows give the median of several processes and what they range from and to. Seconds are those of
the processor, and wall seconds those of the clock. The model is cut after some blocks, because memory does not depend
on their number.

- memory: both sides, for Wanda and SparseGPT.
- batches: `prune` with Wanda for several numbers of sequences that run together. A row is one process. Every round has
  one process of each kind, so that what else the machine does falls on all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import prune, sample_sequences
from peft_sparse.calibration.memory import give_back_freed
from pruning import HALF, published_hook, published_rows, published_sparsegpt

from common import Rows, parser, peak_resident, python_documents, reset_peak, smollm2_dir


MIB = 1 << 20

# Of `measure_batches`: the calibration tokens of a run, and the numbers of sequences that run together.
TOKENS = 8192
BATCHES = [1, 2, 4, 8, 16, 32]


@torch.no_grad()
def published_prune(model: Any, tokens: Tensor, criterion: str) -> None:
    """Prune half of every weight of the blocks, one after the other, as published code does."""
    sequences, length = tokens.shape
    before = torch.zeros(sequences, length, model.config.hidden_size)
    after = torch.zeros_like(before)
    for i in range(sequences):
        before[i] = model.model.embed_tokens(tokens[i])
    rotary = model.model.rotary_emb(before[:1], torch.arange(length)[None])
    call = {"position_embeddings": rotary, "attention_mask": None}
    for block in model.model.layers:
        layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
        sums = [torch.zeros(*[m.in_features] * (2 if criterion == "sparsegpt" else 1)) for m in layers]
        hooks = [
            m.register_forward_hook(published_hook(total, sequences)) for m, total in zip(layers, sums, strict=True)
        ]
        for i in range(sequences):
            after[i] = block(before[i : i + 1], **call)[0]
        for hook in hooks:
            hook.remove()
        for index, m in enumerate(layers):
            if criterion == "sparsegpt":
                m.weight.copy_(published_sparsegpt(m.weight, sums[index], HALF))
                # The published solver frees the Hessian of a layer once it is solved.
                sums[index] = torch.empty(0)
            else:
                m.weight[~published_rows(m.weight.abs() * sums[index].sqrt(), HALF)] = 0
        for i in range(sequences):
            after[i] = block(before[i : i + 1], **call)[0]
        before, after = after, before


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


def run_one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process, and return its peak above the loaded model, in bytes, and the processor's seconds."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tokens = sample_sequences(python_documents()[0], tokenizer, arguments.sequences, arguments.length)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=torch.float32)
    model.model.layers = model.model.layers[: arguments.blocks]
    del tokenizer
    with torch.no_grad():
        # Weights are mapped from their file, and are in memory once they are read and written.
        for parameter in model.parameters():
            parameter.mul_(1)
        model(tokens[:1, :8])
    # What the C library still holds of the loading counts for neither side.
    give_back_freed()
    reset_peak()
    loaded, started, wall = resident(), time.process_time(), time.perf_counter()
    if arguments.side == "published":
        published_prune(model, tokens, arguments.criterion)
    else:
        prune(model, 0.5, tokens, criterion=arguments.criterion, batch_size=arguments.batch_size)
    return {
        "bytes": peak_resident() - loaded,
        "loaded_bytes": loaded,
        "seconds": time.process_time() - started,
        "wall_seconds": time.perf_counter() - wall,
    }


def in_process(of_run: dict[str, Any]) -> dict[str, Any]:
    """Return what `run_one` returns with the settings `of_run` in a process of its own."""
    given = [text for name, value in of_run.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, __file__, "one", *given], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_processes(repeats: int, of_run: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of what several processes with the settings `of_run` return."""
    runs = [in_process(of_run) for _ in range(repeats)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    spread = [min(run["bytes"] for run in runs), max(run["bytes"] for run in runs)]
    return {"repeats": repeats, "mib": round(medians["bytes"] / MIB)} | medians | {"bytes_from_to": spread}


def measure_batches(arguments: argparse.Namespace) -> None:
    """Measure the batches of `BATCHES` of 8,192 tokens in all, and print the medians."""
    common = {"blocks": arguments.blocks}
    rows = Rows(arguments.output, {"settings": common | {"threads": torch.get_num_threads()}})
    grid = [
        {"length": length, "sequences": TOKENS // length, "batch_size": size}
        for length in arguments.lengths or [128, 512]
        for size in BATCHES
        if size * length <= TOKENS
    ]
    for number in range(arguments.repeats):
        for of_run in grid:
            if rows.find(round=number, **of_run) is None:
                rows.add({"round": number} | of_run | in_process(common | of_run))
    print("| tokens | batch | MiB | seconds of the processor | seconds of the clock |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for of_run in grid:
        own = [row for row in rows if of_run.items() <= row.items()]
        mib, seconds, wall = (statistics.median(row[n] for row in own) for n in ("bytes", "seconds", "wall_seconds"))
        print(f"| {of_run['length']} | {of_run['batch_size']} | {mib / MIB:.0f} | {seconds:.1f} | {wall:.1f} |")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", nargs="?", choices=["memory", "batches", "one"], default="memory")
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--lengths", type=int, nargs="+")
    options.add_argument("--criteria", nargs="+", default=["wanda", "sparsegpt"])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--blocks", type=int, default=3)
    options.add_argument("--output", type=Path)
    options.add_argument("--side", choices=["ours", "published"], default="ours", help="of one run")
    options.add_argument("--criterion", default="wanda", help="of one run")
    options.add_argument("--length", type=int, default=512, help="of one run")
    options.add_argument("--batch-size", type=int, default=1, help="of one run")
    arguments = options.parse_args()
    torch.manual_seed(0)
    if arguments.what == "one":
        print(json.dumps(run_one(arguments)))
        return
    if arguments.what == "batches":
        measure_batches(arguments)
        return
    common = {"sequences": arguments.sequences, "blocks": arguments.blocks}
    grid = [
        {"criterion": criterion, "length": length, "side": side}
        for length in arguments.lengths or [512]
        for criterion in arguments.criteria
        for side in ("published", "ours")
    ]
    rows = Rows(arguments.output, {"settings": common})
    for of_run in grid:
        if rows.find(**of_run) is None:
            rows.add(of_run | in_processes(arguments.repeats, common | of_run))


if __name__ == "__main__":
    main()

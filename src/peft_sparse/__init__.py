"""Prune, retrain without filling a zero, merge, share: sparse models in transformers and PEFT.

    prune     zeros written into a model in place
    attach    get_peft_model(model, MaskLoRAConfig(...))
    recover   SparseTrainer
    merge     merge_and_unload(): a plain model, the same zeros

Importing the package registers its tuners with PEFT.
"""

from .callbacks import PruningCallback, ZeroGuardCallback
from .evaluation import perplexity
from .masks import SemiStructured, Unstructured
from .prune import prune, sparsity
from .trainer import SparseTrainer, SparseTrainingArguments
from .tuners import MaskLoRAConfig, ScaledLoRAConfig


__all__ = [
    "MaskLoRAConfig",
    "PruningCallback",
    "ScaledLoRAConfig",
    "SemiStructured",
    "SparseTrainer",
    "SparseTrainingArguments",
    "Unstructured",
    "ZeroGuardCallback",
    "perplexity",
    "prune",
    "sparsity",
]

__version__ = "0.1.0.dev0"

"""Prune, retrain without filling a zero, merge, share: sparse models in transformers and PEFT.

    prune     zeros written into a model in place
    attach    get_peft_model(model, MaskLoRAConfig(...))
    recover   SparseTrainer
    merge     merge_and_unload(): a plain model, the same zeros

Importing the package registers its tuners with PEFT.
"""

from .arguments import SparseTrainingArguments
from .callbacks import PruningCallback
from .criteria import Criterion, Statistics
from .evaluation import perplexity
from .freezing import FreezingCallback
from .guard import ZeroGuardCallback
from .masks import SemiStructured, Unstructured
from .plan import plan, plan_reconstruction, plan_training
from .prune import prune, sparsity
from .reconstruction import reconstruct, reconstruct_checkpoint
from .schedules import CubicSchedule, PruningCycles
from .streaming import prune_checkpoint
from .structured import compact, prune_structured
from .text import pack_sequences, sample_sequences
from .trainer import SparseTrainer
from .tuners import MaskLoRAConfig, ScaledLoRAConfig


__all__ = [
    "Criterion",
    "CubicSchedule",
    "FreezingCallback",
    "MaskLoRAConfig",
    "PruningCallback",
    "PruningCycles",
    "ScaledLoRAConfig",
    "SemiStructured",
    "SparseTrainer",
    "SparseTrainingArguments",
    "Statistics",
    "Unstructured",
    "ZeroGuardCallback",
    "compact",
    "pack_sequences",
    "perplexity",
    "plan",
    "plan_reconstruction",
    "plan_training",
    "prune",
    "prune_checkpoint",
    "prune_structured",
    "reconstruct",
    "reconstruct_checkpoint",
    "sample_sequences",
    "sparsity",
]

__version__ = "0.1.0.dev0"

"""Pruning, PEFT tuners that keep zeros, a Trainer that guards them, and layer-wise reconstruction.

    prune         writes zeros into a model, in place
    attach        get_peft_model(model, MaskLoRAConfig(...))
    retrain       SparseTrainer(model, args, ...).train()
    reconstruct   fits the pruned model to the dense one, layer by layer
    merge         merge_and_unload(): a plain model with the same zeros

Importing the package registers the tuners with PEFT.
"""

from .calibration.norms import NormsReport, recalibrate_norms
from .calibration.own_text import generate_sequences
from .calibration.statistics import Statistics
from .calibration.text import pack_sequences, sample_sequences
from .evaluation import (
    Comparison,
    KernelReport,
    LoadedModel,
    TaskReport,
    TextPerplexity,
    compare_models,
    evaluate_tasks,
    generation_speeds,
    kernel_speed,
    load_model,
    metric_path,
    text_perplexity,
)
from .evaluation.domains import PerplexityReport, perplexity_by_domain
from .evaluation.perplexity import perplexity
from .model.environment import environment, peak_memory
from .planning import plan_pruning, plan_reconstruction, plan_training
from .pruning.allocation import ERK, LAMP, GlobalMagnitude, Uniform, UniformPlus
from .pruning.checkpoint import prune_checkpoint
from .pruning.criteria import GBLM, RIA, Criterion, Magnitude, Random, Wanda
from .pruning.dsnot import DSnoT
from .pruning.least_squares import LeastSquares
from .pruning.owl import OWL
from .pruning.patterns import SemiStructured, Unstructured
from .pruning.prune import prune, sparsity
from .pruning.report import PruningReport
from .pruning.sparsegpt import SparseGPT
from .pruning.swap import Swap
from .recipes import Recipe, compress, load_recipe
from .reconstruction import (
    Fit,
    ReconstructionObserver,
    ReconstructionReport,
    RegionReport,
    ResidualReport,
    ResidualWeightReport,
    Step,
    reconstruct,
    reconstruct_checkpoint,
    residual_lora,
)
from .reporting import RunReport, Stage, read_report, report_page, write_report
from .sharing import inspect_checkpoint, pack_checkpoint, push_folder, unpack_checkpoint, write_card
from .structured import compact, prune_structured
from .training.arguments import SparseTrainingArguments
from .training.freezing import FreezingCallback
from .training.learning_rates import retraining_schedule
from .training.pruning_callback import PruningCallback
from .training.pruning_schedules import CubicSchedule, PruningCycles
from .training.trainer import SparseTrainer
from .training.zero_guard import ZeroGuardCallback
from .tuners import (
    MaskLoRAConfig,
    ScaledLoRAConfig,
    keep_effective_weights,
    merged_state_dict,
    trainable_shares,
)


__all__ = [
    "ERK",
    "GBLM",
    "LAMP",
    "OWL",
    "RIA",
    "Comparison",
    "Criterion",
    "CubicSchedule",
    "DSnoT",
    "Fit",
    "FreezingCallback",
    "GlobalMagnitude",
    "KernelReport",
    "LeastSquares",
    "LoadedModel",
    "Magnitude",
    "MaskLoRAConfig",
    "NormsReport",
    "PerplexityReport",
    "PruningCallback",
    "PruningCycles",
    "PruningReport",
    "Random",
    "Recipe",
    "ReconstructionObserver",
    "ReconstructionReport",
    "RegionReport",
    "ResidualReport",
    "ResidualWeightReport",
    "RunReport",
    "ScaledLoRAConfig",
    "SemiStructured",
    "SparseGPT",
    "SparseTrainer",
    "SparseTrainingArguments",
    "Stage",
    "Statistics",
    "Step",
    "Swap",
    "TaskReport",
    "TextPerplexity",
    "Uniform",
    "UniformPlus",
    "Unstructured",
    "Wanda",
    "ZeroGuardCallback",
    "compact",
    "compare_models",
    "compress",
    "environment",
    "evaluate_tasks",
    "generate_sequences",
    "generation_speeds",
    "inspect_checkpoint",
    "keep_effective_weights",
    "kernel_speed",
    "load_model",
    "load_recipe",
    "merged_state_dict",
    "metric_path",
    "pack_checkpoint",
    "pack_sequences",
    "peak_memory",
    "perplexity",
    "perplexity_by_domain",
    "plan_pruning",
    "plan_reconstruction",
    "plan_training",
    "prune",
    "prune_checkpoint",
    "prune_structured",
    "push_folder",
    "read_report",
    "recalibrate_norms",
    "reconstruct",
    "reconstruct_checkpoint",
    "report_page",
    "residual_lora",
    "retraining_schedule",
    "sample_sequences",
    "sparsity",
    "text_perplexity",
    "trainable_shares",
    "unpack_checkpoint",
    "write_card",
    "write_report",
]

__version__ = "0.1.0.dev0"

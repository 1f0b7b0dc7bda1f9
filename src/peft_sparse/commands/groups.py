"""Which fields of `SparseTrainingArguments` the help of a command shows, in which groups, and in which words."""

# What to prune, and how.
SPARSITY = ("sparsity", "pattern")
PRUNING = (
    "criterion",
    "criterion_options",
    "group",
    "allocation",
    "allocation_options",
    "refinement",
    "refinement_options",
    "update",
    "update_options",
    "target_modules",
    "exclude_modules",
    "calibration_samples",
)
RECONSTRUCTION = (
    "reconstruction_region",
    "reconstruction_learning_rate",
    "reconstruction_epochs",
    "reconstruction_batch_size",
    "reconstruction_mode",
    "reconstruction_loss",
    "reconstruction_holdout",
    "activations",
)
# The length and the rate of a training.
TRAINING = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
)
RETRAINING = (
    "retraining_schedule",
    "find_learning_rate",
    "distillation",
    "distillation_weight",
    "distillation_temperature",
    "pruning_schedule",
    "pruning_rounds",
    "pruning_interval",
)
RUN = ("output_dir", "seed", "use_cpu")

# Fields of `transformers.TrainingArguments` in the words of this package.
WORDS = {
    "sparsity": "Fraction of zeros to prune to, in [0, 1).",
    "output_dir": "Folder to write to.",
    "seed": "Seed of all random choices.",
    "use_cpu": "Compute on the CPU, also where there is a GPU.",
    "max_steps": "Optimiser steps of the training. Above 0 it replaces the epochs.",
    "num_train_epochs": "Passes over the training text.",
    "learning_rate": "Learning rate.",
    "warmup_steps": "Steps in which the rate rises: a number, or a fraction below 1.",
    "per_device_train_batch_size": "Sequences in a batch of one device.",
    "gradient_accumulation_steps": "Batches for each optimiser step.",
    "bf16": "Compute in bfloat16.",
    "activations": 'Where hidden states wait between blocks: "device", "cpu" or "disk".',
    "calibration_samples": "How many sequences calibration and reconstruction read.",
    "resume_from_checkpoint": "true, to continue the run in `output_dir` that was stopped; or a checkpoint.",
}

"""One process of several, started by `accelerate launch`: trains in every mode and saves what came of it.

accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml tests/distributed.py fsdp2 FOLDER
"""

import gc
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.profiler import record_function
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_sparse import (
    MaskLoRAConfig,
    PruningCallback,
    ScaledLoRAConfig,
    SparseTrainer,
    SparseTrainingArguments,
    ZeroGuardCallback,
    perplexity,
    prune,
)
from peft_sparse.tuners import merged_state_dict

from conftest import Samples, tiny
from trainers import arguments


ADAPTERS = {"MaskLoRA": MaskLoRAConfig, "ScaledLoRA": ScaledLoRAConfig, "cycles": MaskLoRAConfig}
MODES = ["MaskLoRA", "ScaledLoRA", "full", "callback", "cubic", "cycles", "distillation"]
RESUMED = ["MaskLoRA", "full", "cubic", "cycles"]
STEPS = 4


def on_cpu(strategy):
    """Let accelerate choose FSDP or DeepSpeed, which it does not consider on CPUs."""
    if strategy == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if strategy in ("zero2", "zero3"):
        os.environ["ACCELERATE_USE_CPU"] = "false"


def trainer_for(mode, folder, strategy=None, kind=SparseTrainer, **kwargs):
    """A Trainer of 4 samples a step, over however many processes."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    # Before the arguments, with whose DeepSpeed whatever is made is partitioned, and before those of the run before.
    unset_hf_deepspeed_config()
    torch.manual_seed(0)
    model = tiny("llama")
    if mode in ADAPTERS:
        # Cycles change weights without an adapter too, which a checkpoint must hold.
        targets = ["q_proj", "v_proj"] if mode == "cycles" else "all-linear"
        model = get_peft_model(model, ADAPTERS[mode](r=2, target_modules=targets, task_type="CAUSAL_LM"))
    options = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "seed": 3} | kwargs
    options["per_device_train_batch_size"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "callback":
        args = arguments(folder, TrainingArguments, **options)
    else:
        if mode in ("cubic", "cycles"):
            options |= {"pruning_schedule": mode, "pruning_rounds": 2, "pruning_interval": 1}
        if mode == "distillation":
            options |= {"distillation": "logits"}
        args = arguments(folder, SparseTrainingArguments, sparsity=0.5, **options)
    on_cpu(strategy)
    if mode == "callback":
        callbacks = [PruningCallback(0.5), ZeroGuardCallback()]
        return Trainer(model, args, train_dataset=Samples(), callbacks=callbacks)
    return kind(model, args, train_dataset=Samples())


def outcome(trainer):
    """What must be the same however many processes there are."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    guard = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ZeroGuardCallback))
    guard.check()
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "sparsity": guard.sparsity(),
        "fingerprints": guard.fingerprints,
        "weights": merged_state_dict(trainer.model),
        "perplexity": perplexity(trainer.model, Samples().tokens[:4]),
    }


def train(mode, folder, strategy=None):
    """Train; resume from the middle too; save the merged model."""
    trainer = trainer_for(mode, folder, strategy)
    trainer.train()
    found = {"whole": outcome(trainer)}
    if mode != "callback":
        trainer.save_merged_model(f"{folder}/merged")
    if mode in RESUMED:
        resumed = trainer_for(mode, folder, strategy)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        found["resumed"] = outcome(resumed)
    return found


class InProcessOne(TrainerCallback):
    """Does something in one process in the middle of the second step."""

    def __init__(self, what):
        self.what = what

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            self.what()


def failing():
    raise RuntimeError("the words of process 1")


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(what, strategy, folder):
    """Train with something happening in one process; save the step at which this one came to an end."""
    trainer = trainer_for("MaskLoRA", folder, strategy, save_on_sigterm=True, gradient_accumulation_steps=2)
    trainer.add_callback(InProcessOne({"fail": failing, "terminate": terminated}[what]))
    trainer.train()
    torch.save(trainer.state.global_step, Path(folder) / f"{os.environ['RANK']}.pt")


def train_all(strategy, folder):
    for mode in MODES:
        torch.save(train(mode, Path(folder) / mode, strategy), Path(folder) / f"{mode}.{os.environ['RANK']}.pt")


class Counting(SparseTrainer):
    """Counts the base weights that autograd holds after each forward pass."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        weights = [p for name, p in self.model.named_parameters() if "base_layer" in name]
        shapes = {tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights}
        self.held = sum(tuple(tensor.shape) in shapes for tensor in saved_for_backward(loss.grad_fn))
        return loss


def saved_for_backward(node):
    """Every tensor that has memory, below a node of the graph."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
        tensors = getattr(node, "saved_tensors", ())
        yield from (tensor for tensor in tensors if tensor is not None and tensor.untyped_storage().size())


def count_held(strategy, folder):
    trainer = trainer_for("MaskLoRA", folder, strategy, Counting, max_steps=1)
    trainer.train()
    torch.save(trainer.held, Path(folder) / f"{os.environ['RANK']}.pt")


# Small, or their buffers would be most of the memory.
DEEPSPEED = {
    "reduce_bucket_size": 50_000,
    "stage3_max_live_parameters": 100_000,
    "stage3_param_persistence_threshold": 0,
}
DEEPSPEED |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


class Mark(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        gc.collect()
        with record_function("step"):
            torch.zeros(1)


def measure(strategy, folder, mode):
    """Save the most memory that this process had in a step."""
    sys.path.insert(0, str(Path(__file__).parent / "planning"))
    from test_training_plan import BATCH, MASK_LORA, allocated, dataset, loaded

    options = {"max_steps": 5, "per_device_train_batch_size": BATCH}
    if strategy.startswith("zero"):
        # What the launcher says would contradict it.
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_CONFIG_DS"))]:
            del os.environ[name]
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        options["deepspeed"] = auto | {"zero_optimization": {"stage": int(strategy[-1])} | DEEPSPEED}

    def run():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        model = loaded("deep")
        prune(model, 0.5)
        model = model if mode == "full" else get_peft_model(model, MASK_LORA)
        args = arguments(folder, **options)
        on_cpu(strategy)
        SparseTrainer(model, args, train_dataset=dataset(16), callbacks=[Mark()]).train()

    peak = allocated(run, Path(folder) / f"{os.environ['RANK']}.json", steps="step")
    torch.save(peak, Path(folder) / f"{os.environ['RANK']}.pt")


def main(strategy, folder, what="all", *more):
    if strategy in ("zero2", "zero3"):
        import deepspeed.ops

        # Collectives in shared memory, which are compiled when first used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if what == "all":
        train_all(strategy, folder)
    elif what == "held":
        count_held(strategy, folder)
    elif what == "memory":
        measure(strategy, folder, *more)
    else:
        interrupt(what, strategy, folder)
    # A thread of gloo that outlives the interpreter aborts the process, see `in_two_processes`.
    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Every refusal of `training/`, with its words."""

import copy
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from peft_sparse import (
    CubicSchedule,
    FreezingCallback,
    MaskLoRAConfig,
    PruningCallback,
    PruningCycles,
    SparseTrainer,
    SparseTrainingArguments,
    prune,
    sparsity,
)
from peft_sparse.training.base_weights import save_base
from peft_sparse.training.chain import AfterReconstruction
from peft_sparse.training.checkpoints import last_complete_checkpoint
from peft_sparse.training.distillation import (
    check_teacher,
    hidden_states_loss,
    logits_loss,
    predictions,
    sum_of_losses,
)
from peft_sparse.training.learning_rates import norm_drop, retraining_schedule
from peft_sparse.training.midway_evaluation import MidwayEvaluation
from peft_sparse.training.protected import check_fingerprints
from peft_sparse.training.rate_search import RateSearch, best_rate
from peft_sparse.training.recalibration import Recalibration
from peft_sparse.training.saving import save_plain_model
from peft_sparse.training.zero_guard import ZeroGuardCallback

from conftest import CONFIGS, Samples, tiny
from refusing import TOKENS, _State, adapted, arguments, llama, merged
from trainers import StopAt


def reconstructed_by_trainer(**resuming):
    options = {"recovery": "reconstruct", "sparsity": 0.5, "calibration_samples": 2, "save_strategy": "no"}
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    SparseTrainer(llama(), arguments(**options), train_dataset=data, callbacks=[StopAt(1)]).train(**resuming)


def chained_twice():
    args = arguments(recovery="reconstruct,retrain", sparsity=0.5, calibration_samples=2, save_strategy="no")
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = SparseTrainer(llama(), args, train_dataset=data)
    trainer.model = adapted()
    trainer.train()


def trained(model, data=TOKENS, **options):
    rows = None if data is None else [{"input_ids": row, "labels": row} for row in data]
    SparseTrainer(model, arguments(max_steps=6, save_strategy="no", **options), train_dataset=rows).train()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight


def tied_without_configuration():
    model = get_peft_model(Tied(), MaskLoRAConfig(target_modules=["first"]))
    save_plain_model(model, "plain", merge=True, write=True, sparsity=0.0)


def terminated_in_a_thread():
    """Train in a thread with `save_on_sigterm`. The model is not touched."""
    model, raised = llama(), []

    def run():
        try:
            trained(model, sparsity=0.5, save_on_sigterm=True)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    thread.join()
    assert sparsity(model) == 0
    raise raised[0]


def resumed_from(path):
    model = llama()
    args = arguments(sparsity=0.5, max_steps=2)
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    try:
        SparseTrainer(model, args, train_dataset=data).train(resume_from_checkpoint=path)
    finally:
        assert sparsity(model) == 0


def beside_reconstruction(callback, recovery):
    model = llama()
    args = arguments(recovery=recovery, sparsity=0.5, calibration_samples=2, max_steps=1, save_strategy="no")
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.add_callback(callback)
    try:
        trainer.train()
    finally:
        assert sparsity(model) == 0


def reconstructed_again():
    options = {"recovery": "reconstruct", "sparsity": 0.5, "calibration_samples": 2, "max_steps": 1}
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = SparseTrainer(llama(), arguments(**options), train_dataset=data, callbacks=[StopAt(2)])
    with pytest.raises(RuntimeError, match="The 1 regions before it are finished"):
        trainer.train()
    trainer.train()


class OwnLoss(SparseTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def own_loss_and_distillation():
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    args = arguments(sparsity=0.5, distillation="logits", save_strategy="no", max_steps=1)
    OwnLoss(llama(), args, train_dataset=data).train()


def without_data(data):
    model = llama()
    try:
        trained(model, data, sparsity=0.5)
    finally:
        assert sparsity(model) == 0


def cycles_beside_another():
    model = adapted()
    model.add_adapter("other", MaskLoRAConfig(target_modules=["q_proj"]))
    trained(model, sparsity=0.5, pruning_schedule="cycles", pruning_rounds=2)


def continued_elsewhere():
    state = SimpleNamespace(global_step=4, log_history=[{"reconstructed": "one"}])
    AfterReconstruction("another", 1.0, 1).on_train_begin(None, state, None)


def taught_by_trainer(model):
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    args = arguments(recovery="reconstruct", sparsity=0.5, calibration_samples=2, save_strategy="no")
    SparseTrainer(model, args, train_dataset=data, teacher=llama()).train()


def evaluated_midway(**changed):
    what = {"eval_strategy": "steps", "eval_on_start": False, "reconstruction_mode": "DD", "world_size": 1}
    args = SimpleNamespace(**what | {"device": torch.device("cpu")} | changed)
    MidwayEvaluation(SimpleNamespace(args=args, model=llama())).check()


def flattening_trainer():
    plugin = SimpleNamespace(fsdp_version=1, activation_checkpointing=False)
    with mock.patch.object(AcceleratorState, "fsdp_plugin", plugin, create=True):
        SparseTrainer(llama(), arguments())


def changed_of_mind():
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = SparseTrainer(llama(), arguments(sparsity=0.5, max_steps=1, save_strategy="no"), train_dataset=data)
    trainer.args.sparsity = 0.6
    trainer.train()


def guarded_vandalism():
    model, guard = llama(), ZeroGuardCallback()
    prune(model, 0.5)
    model.requires_grad_(False)
    guard.on_train_begin(None, _State(), None, model=model)
    model.model.layers[2].mlp.up_proj.weight.add_(1)
    guard.check()


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def scheduled(method, original=(0.1, 0.1, 0.1), lr=0.1):
    return retraining_schedule(method, torch.optim.SGD([torch.zeros(1)], lr=lr), original, 3)


def searched(samples=4, optimizers=(None, None)):
    data = [{"input_ids": row, "labels": row} for row in TOKENS[:samples]]
    args = arguments(find_learning_rate=True, max_steps=1, save_strategy="no")
    SparseTrainer(half_pruned(), args, train_dataset=data, optimizers=optimizers).train()


def with_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    searched(optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)))


def cycles(model, step=0, **options):
    state = _State()
    state.global_step = step
    PruningCallback(0.5, schedule=PruningCycles(2)).on_train_begin(arguments(**options), state, None, model=model)


def prune_in_parts(model):
    next(model.parameters()).ds_tensor = torch.zeros(1)
    PruningCallback(0.5, criterion="wanda", calibration=torch.zeros(1, 2).long()).prune(model, 0)


def teacher_in_parts():
    teacher = llama()
    next(teacher.parameters()).ds_tensor = torch.zeros(1)
    check_teacher(teacher, llama(), "logits")


def two_gpus():
    args = arguments(distillation="logits")
    with mock.patch.object(SparseTrainingArguments, "n_gpu", 2):
        SparseTrainer(llama(), args, teacher=llama())


def half_pruned():
    model = llama()
    prune(model, 0.5)
    return model


def shared_teacher(model):
    SparseTrainer(model, arguments(distillation="logits"), teacher=model)


def freeze(model, sharded=False):
    args = SimpleNamespace(fsdp=["full_shard"] if sharded else [], deepspeed=None, world_size=1)
    FreezingCallback().on_train_begin(args, None, None, model=model)


def two_active_adapters():
    model = llama()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for name in ("one", "two"):
            model.add_adapter(MaskLoRAConfig(r=2, target_modules=["q_proj"]), name)
    model.set_adapter(["one", "two"])
    SparseTrainer(model, arguments(sparsity=0.5)).train()


def added(path, **config):
    model = llama()
    model.add_adapter(MaskLoRAConfig(r=2, **config))
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    args = SparseTrainingArguments(path, max_steps=1, save_steps=1, use_cpu=True, report_to="none")
    return SparseTrainer(model, args, train_dataset=data)


def adapter_of_another_shape():
    added("out", target_modules=["q_proj", "v_proj"]).train()
    added("out", target_modules=["q_proj"]).train(resume_from_checkpoint=True)


def base_of_another_run():
    model = adapted()
    callback = PruningCallback(0.5, schedule=PruningCycles(2))
    state = _State()
    state.global_step = 3
    save_base(model, Path("out/checkpoint-3/pruned_base.safetensors"), write=True)
    args = SparseTrainingArguments("out", use_cpu=True, report_to="none")
    callback.on_train_begin(args, state, None, model=model)


def another_sparsity_too_late():
    state = _State()
    state.global_step, state.log_history = 4, [{"pruning": 0.598, "asked": 0.6, "step": 3}]
    args = SparseTrainingArguments("out", use_cpu=True, report_to="none")
    PruningCallback(0.7, schedule=PruningCycles(2)).on_train_begin(args, state, None, model=llama())


class TokenSamples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": TOKENS[index]}


def where_others_keep_files():
    folder = Path("out") / "reconstruction"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    args = SparseTrainingArguments(
        "out", recovery="reconstruct", sparsity=0.5, calibration_samples=2, max_steps=1, use_cpu=True, report_to="none"
    )
    try:
        SparseTrainer(llama(), args, train_dataset=Samples()).train()
    finally:
        assert (folder / "results.json").exists()


class TiedInside(LlamaForCausalLM):
    """A class that ties its head in the constructor, and knows no switch for it."""

    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = self.model.embed_tokens.weight


def beside_an_adapter():
    model = adapted()
    model.save_pretrained("both")
    save_plain_model(model, "both", merge=False, write=True, sparsity=0.0)


def trained_tied_head(kind, config):
    model = kind(config)
    with warnings.catch_warnings(action="ignore"):  # PEFT tells that the head is tied
        model = get_peft_model(model, MaskLoRAConfig(target_modules=["lm_head"]))
    try:
        save_plain_model(model, "merged", merge=True, write=True, sparsity=0.0)
    finally:
        assert not Path("merged").exists()


def t5(kind):
    return kind(vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)


REFUSALS = [
    (
        beside_an_adapter,
        ValueError,
        "'both' holds an adapter .adapter_config.json., which .* Save the model to another folder",
    ),
    (
        lambda: trained_tied_head(T5ForConditionalGeneration, t5(T5Config)),
        ValueError,
        "'lm_head.weight', 'shared.weight'. are one tied weight, .*T5ForConditionalGeneration ties .* whatever its "
        "configuration says. Save the adapter instead",
    ),
    (
        lambda: trained_tied_head(UMT5ForConditionalGeneration, t5(UMT5Config)),
        ValueError,
        "are one tied weight, .* the forward pass of UMT5ForConditionalGeneration depends on `tie_word_embeddings`",
    ),
    (
        lambda: trained_tied_head(TiedInside, copy.deepcopy(CONFIGS["llama"])),
        ValueError,
        "'lm_head.weight', 'model.embed_tokens.weight'. are one tied weight, .* TiedInside ties .* whatever",
    ),
    (
        two_active_adapters,
        ValueError,
        "The adapters 'one', 'two' are active, and transformers saves one adapter of `add_adapter`. Call",
    ),
    (
        adapter_of_another_shape,
        ValueError,
        "The adapter in 'out/checkpoint-1' has .* tensors.*, and the adapter of the model does not. Attach",
    ),
    (
        base_of_another_run,
        ValueError,
        "base weights in .*pruned_base.* are not those on which the resumed adapter was trained. Resume from",
    ),
    (
        another_sparsity_too_late,
        ValueError,
        "The resumed run has pruned to sparsity 0.6 by step 4, .* end at 0.7, with no pruning after step 3. Resume",
    ),
    (
        lambda: last_complete_checkpoint("nowhere"),
        ValueError,
        "Expected a complete checkpoint in 'nowhere', found none. Give the path of a checkpoint, or leave",
    ),
    (
        where_others_keep_files,
        ValueError,
        "where 'results.json' is not one of its files and would be deleted. Move the folder, or give another",
    ),
    (
        lambda: arguments(sparsity=0.5, allocation="erk", allocation_options="power=2"),
        ValueError,
        "`allocation_options` must be a dict, or JSON .* Got `allocation_options='power=2'` and `allocation='erk'`",
    ),
    (lambda: arguments(pattern="2:4", sparsity=0.7), ValueError, '`sparsity=0.7` contradicts `pattern="2:4"`'),
    (lambda: arguments(group="all"), ValueError, "`group` must be one of .* got 'all'"),
    (
        lambda: arguments(pattern="2:4", group="row"),
        ValueError,
        "The pattern 2:4 compares within each 4 inputs, and takes no other group. Remove `group='row'`",
    ),
    (lambda: arguments(recovery="rest"), ValueError, "`recovery` must be one of 'retrain', .* got 'rest'"),
    (lambda: arguments(calibration_samples=0), ValueError, "`calibration_samples` must be at least 1, got 0"),
    (
        lambda: SparseTrainer(llama(), TrainingArguments("unused", use_cpu=True)),
        TypeError,
        "Expected `args` as SparseTrainingArguments, got TrainingArguments",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(sparsity=0.5, criterion="wanda")),
        ValueError,
        "Calibration uses the first 128 samples of `train_dataset`, and there is none. Pass `train_dataset` or `calib",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(sparsity=0.5, criterion="wanda"), train_dataset=TokenSamples()),
        ValueError,
        "`calibration_samples=128` needs as many training samples, and `train_dataset` has only 4. Lower",
    ),
    (
        reconstructed_by_trainer,
        RuntimeError,
        "stopped reconstruction in 'model.layers.0 .attention.'. The 0 regions before .* Load the model again",
    ),
    (
        lambda: reconstructed_by_trainer(resume_from_checkpoint="no-such-folder"),
        ValueError,
        "Expected 'no-such-folder' to hold the finished regions of a reconstruction, found none. Resume with",
    ),
    (
        lambda: arguments(recovery="reconstruct", sparsity=0.5, save_on_sigterm=True),
        ValueError,
        "can be resumed with `resume_from_checkpoint=True` after any interruption. Leave `save_on_sigterm` out",
    ),
    (
        lambda: without_data(None),
        ValueError,
        "needs samples, and `train_dataset` is None. Pass samples, or set",
    ),
    (lambda: without_data([]), ValueError, "needs samples, and `train_dataset` is empty"),
    (
        lambda: trained(merged()),
        ValueError,
        "'default' is merged into .*q_proj', so that training .* Call `unmerge_adapter",
    ),
    (
        tied_without_configuration,
        ValueError,
        r"'first.weight', 'second.weight'\] are one tied .* Save the adapter inste",
    ),
    (cycles_beside_another, ValueError, "The adapter 'other' would then compute something else. Call `delete_adapter"),
    (chained_twice, ValueError, "has reconstructed its model and attached an adapter already. Make a new"),
    (
        continued_elsewhere,
        ValueError,
        "at step 4 continues the reconstruction one, and .* gave another. Resume with the `output_dir`",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(recovery="none")),
        ValueError,
        '`recovery="none"` only prunes, and there is no sparsity. Set `sparsity`',
    ),
    (
        lambda: arguments(recovery="reconstruct,retrain", sparsity=0.5, retraining_schedule="allr", original_steps=9),
        ValueError,
        '`retraining_schedule="allr"` depends on how much pruning changed the norm .* Use another schedule, such as',
    ),
    (
        lambda: arguments(recovery="reconstruct", sparsity=0.5, reconstruction_batch_size=0),
        ValueError,
        "`reconstruction_batch_size` must be at least 1, got 0. Leave it out",
    ),
    (
        lambda: SparseTrainer(
            llama(), arguments(recovery="reconstruct", sparsity=0.5), optimizers=(mock.Mock(), None)
        ),
        ValueError,
        "Reconstruction makes an optimiser for each region, .* Leave `optimizers` out",
    ),
    (lambda: reconstructed_by_trainer(trial={}), ValueError, "`hyperparameter_search` does not support `recovery=.*"),
    (flattening_trainer, ValueError, "FSDP1 flattens weights, .* Set `fsdp_version: 2` in the configuration"),
    (
        changed_of_mind,
        ValueError,
        "have `pattern=0.6`, and had `pattern=0.5` when this SparseTrainer was made. .* Make a new SparseTrainer",
    ),
    (
        lambda: arguments(recovery="reconstruct", sparsity=0.5, fp16=True),
        ValueError,
        "Reconstruction does not scale the loss, and `fp16` needs that. Use `bf16=True`",
    ),
    (
        lambda: SparseTrainer(adapted(), arguments(sparsity=0.5), peft_config=MaskLoRAConfig()),
        ValueError,
        "`peft_config` attaches an adapter, and the model has adapters already. Leave `peft_config` out, or pass",
    ),
    (
        lambda: SparseTrainer(adapted(), arguments(sparsity=0.5, recovery="reconstruct")),
        ValueError,
        "Reconstruction attaches and merges an adapter for each region, .* Pass the plain model",
    ),
    (lambda: scheduled("cosine"), ValueError, "The retraining schedule must be one of 'ft', .* got 'cosine'"),
    (
        lambda: scheduled("llr", lambda t: 0.1),
        ValueError,
        "`original` is a function, and its number of steps .* Pass `original_steps`",
    ),
    (
        lambda: scheduled("llr", [0.0, 0.0]),
        ValueError,
        "Got 3 steps for 1 rounds, and 2 learning rates from 0.0 to 0.0",
    ),
    (
        lambda: scheduled("llr", lr=0.0),
        ValueError,
        "multiplies the `lr` of the optimiser, which is 0.0. Pass an optimiser with a positive `lr`",
    ),
    (lambda: scheduled("allr"), ValueError, '"allr" depends on how much pruning removed. Pass `norm_drop`'),
    (
        lambda: scheduled("ft", [0.1, 0.0]),
        ValueError,
        '"ft" continues with the last learning rate .* which is 0. Use "lrw"',
    ),
    (
        lambda: scheduled("lrw", [0.1, 0.1]),
        ValueError,
        '"lrw" repeats the last 3 learning rates .* has only 2. Retrain for',
    ),
    (
        lambda: norm_drop((1.0, 4), (1.0, 4)),
        ValueError,
        'Pruning made no further entry zero, .* Start from the dense model, or use "llr"',
    ),
    (
        lambda: arguments(retraining_schedule="llr", recovery="reconstruct", sparsity=0.5),
        ValueError,
        "`retraining_schedule='llr'` is a schedule for training with the task loss, and .* has none. Leave it",
    ),
    (
        lambda: arguments(retraining_schedule="allr"),
        ValueError,
        "`retraining_schedule='allr'` depends on the number of steps .* Set `original_steps`",
    ),
    (
        lambda: arguments(
            retraining_schedule="llr", lr_scheduler_type="reduce_lr_on_plateau", **EVALUATED
        ).original_rates(3),
        ValueError,
        "and those of ReduceLROnPlateau are not known before it runs. Set the `lr_scheduler_type`",
    ),
    (
        lambda: arguments(find_learning_rate=True, retraining_schedule="llr"),
        ValueError,
        "`find_learning_rate` finds one rate .* Leave it out without retraining, with `retraining_schedule`",
    ),
    (
        lambda: arguments(find_learning_rate=True, optim="adalomo"),
        ValueError,
        "`optim='adalomo'` updates the weights during backward, .* Choose another optimiser",
    ),
    (with_schedule, ValueError, "`optimizers` gives one. Pass `optimizers=\\(optimizer, None\\)`"),
    (
        lambda: Recalibration(SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)),
        ValueError,
        "`recalibrate_norms` runs the whole model in each process, .* Train in one process or with DDP, or set",
    ),
    (
        lambda: RateSearch(SimpleNamespace(lr_scheduler=None, is_fsdp_enabled=False, is_deepspeed_enabled=True)),
        ValueError,
        "`find_learning_rate` undoes its trials, .* Find the rate in one process or with DDP",
    ),
    (lambda: searched(1), ValueError, "on others, and the training set has 1 for each process. Pass a larger"),
    (
        lambda: searched(optimizers=(torch.optim.SGD([torch.zeros(1)], lr=0.0), None)),
        ValueError,
        "begins its search at the default `lr` of the optimiser, which is 0.0. Set a positive `learning_rate`",
    ),
    (
        lambda: best_rate(lambda rate: float("nan"), 0.1, 2.0),
        RuntimeError,
        "No learning rate near 0.1 brought the loss .* below that of the untrained model, 2.0000. Check the",
    ),
    (
        lambda: CubicSchedule(0, 5),
        ValueError,
        "`rounds` and `interval` of at least 1, .* Got rounds=0, interval=5, .* prunes every 50 steps",
    ),
    (
        lambda: CubicSchedule(4, 5).sparsities(0.5, 20),
        ValueError,
        "The last of 4 rounds prunes after step 20, and the run has 20 steps. .* Train for more steps",
    ),
    (
        lambda: CubicSchedule(4, 5, initial_sparsity=0.5).sparsities(0.5, 30),
        ValueError,
        "must be above the initial one, got 0.5 and `initial_sparsity=0.5`. Request a higher sparsity",
    ),
    (lambda: PruningCycles(0), ValueError, "`rounds` must be at least 1, got 0. One round prunes"),
    (
        lambda: PruningCycles(4).sparsities(0.5, 3),
        ValueError,
        "4 cycles need at least 4 optimiser steps, .* has 3. Train for",
    ),
    (
        lambda: PruningCallback("2:4", schedule=PruningCycles(2)),
        ValueError,
        "A schedule raises a single sparsity, and the pattern is '2:4'. Pass a sparsity such as 0.5",
    ),
    (
        lambda: cycles(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))),
        ValueError,
        "merges and resets the adapters, and 'base_model.model.model.layers.0.self_attn.q_proj', a Linear, does not",
    ),
    (
        lambda: cycles(adapted(), 3),
        FileNotFoundError,
        "pruned several times during training. The file '.*pruned_base.safetensors' .* Resume with the `output_dir`",
    ),
    (teacher_in_parts, ValueError, "The teacher's weights are sharded over processes, .* Load the teacher before"),
    (
        lambda: prune_in_parts(llama()),
        ValueError,
        'Calibration needs whole blocks, and the weights are sharded .* Or prune by criterion "magnitude"',
    ),
    (
        lambda: SparseTrainingArguments("unused", save_on_sigterm=True, enable_jit_checkpoint=True),
        ValueError,
        "`save_on_sigterm` and `enable_jit_checkpoint` both handle SIGTERM. Set one of them",
    ),
    (
        lambda: cycles(adapted(), load_best_model_at_end=True, save_strategy="steps", save_steps=1, **EVALUATED),
        ValueError,
        "`load_best_model_at_end` may load a checkpoint of lower sparsity, .* Set it to False",
    ),
    (
        lambda: arguments(sparsity=0.5, pruning_schedule="linear"),
        ValueError,
        "`pruning_schedule` must be one of 'cubic', 'cycles', got 'linear'. Leave it out",
    ),
    (
        lambda: arguments(pruning_schedule="cubic"),
        ValueError,
        "`pruning_schedule='cubic'` prunes to `sparsity` during training. It needs `sparsity` and .* only \"cycles\"",
    ),
    (
        lambda: arguments(distillation="labels"),
        ValueError,
        "`distillation` must be one of 'logits', 'hidden_states', got 'labels'",
    ),
    (
        lambda: arguments(distillation="logits", distillation_weight=1.5),
        ValueError,
        r"`distillation_weight` must be in \(0, 1\] .* got 1.5 and 1.0. To train with the task loss alone",
    ),
    (
        lambda: arguments(distillation="logits", recovery="reconstruct", sparsity=0.5),
        ValueError,
        "`distillation` is a loss of retraining, and .* fits the outputs .* Leave `distillation` out",
    ),
    (
        lambda: arguments(distillation="logits", use_liger_kernel=True),
        ValueError,
        "With `use_liger_kernel` the model returns no logits .* Set `use_liger_kernel=False`",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(), teacher=llama()),
        ValueError,
        "`teacher` is given without `distillation`. Set distillation=",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(distillation="logits")),
        ValueError,
        "`distillation='logits'` needs the dense model. Pass it as `teacher`, or set `sparsity`",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(recovery="reconstruct")),
        ValueError,
        "Reconstruction needs a dense model. Set `sparsity` or `pattern`, .* and the dense one as `teacher`",
    ),
    (
        lambda: taught_by_trainer(llama()),
        ValueError,
        "Expected a model pruned to .*, got one with a sparsity of 0.0000. Leave `teacher` out",
    ),
    (
        lambda: arguments(
            recovery="reconstruct", sparsity=0.5, save_strategy="best", metric_for_best_model="loss", **EVALUATED
        ),
        ValueError,
        "a model is whole only after the last region of a reconstruction. Leave them out",
    ),
    (
        lambda: evaluated_midway(device=torch.device("cuda")),
        ValueError,
        "`eval_strategy` runs the whole model on cuda, and parameters are on cpu. Move the model there first",
    ),
    (
        lambda: evaluated_midway(world_size=2),
        ValueError,
        "the processes fit different regions, .* call `evaluate` after `train`, or use mode",
    ),
    (two_gpus, ValueError, "one process per GPU, and this process has 2 GPUs. Start the script"),
    (
        lambda: SparseTrainer(half_pruned(), arguments(distillation="logits", sparsity=0.6)),
        ValueError,
        "needs a dense teacher, and 50.0% of the model's weights are zero already. .* SparseTrainer\\(..., teacher=",
    ),
    (
        lambda: check_teacher(llama(), tiny("mistral"), "hidden_states"),
        ValueError,
        "Teacher and model differ in the number of blocks: 3 and 2. Pass the dense model",
    ),
    (lambda: shared_teacher(llama()), ValueError, "The teacher shares parameters .* copy.deepcopy"),
    (
        lambda: predictions({"input_ids": TOKENS}, lambda: 1),
        ValueError,
        "Distillation needs `labels` among the inputs, .* The inputs are input_ids. Add `labels`",
    ),
    (
        lambda: logits_loss(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2).bool()),
        ValueError,
        r"for the same predictions. Got the shapes \(2, 4\), \(2, 3\) and \(2,\). Use a teacher",
    ),
    (
        lambda: logits_loss(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2).bool()),
        ValueError,
        r"two or more classes, .* shape \(2, 1\) for labels of shape \(2,\). Leave `distillation` out for regression",
    ),
    (
        lambda: logits_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3).bool()),
        ValueError,
        r"one for each label. Got logits of shape \(2, 3\) for labels of shape \(2, 3\). .* several labels per sample",
    ),
    (own_loss_and_distillation, ValueError, "`OwnLoss.compute_loss` does not call it. Call `super\\(\\)"),
    (
        lambda: resumed_from("elsewhere/checkpoint-4"),
        ValueError,
        "a complete checkpoint in 'elsewhere/checkpoint-4', and trainer_state.json is missing .* Give the path",
    ),
    (
        lambda: beside_reconstruction(PruningCallback(0.7), "reconstruct"),
        ValueError,
        "A PruningCallback acts at the steps of a retraining, and `recovery='reconstruct'` .* Remove the callback",
    ),
    (
        lambda: beside_reconstruction(FreezingCallback(), "reconstruct,retrain"),
        ValueError,
        "A FreezingCallback acts .* make another SparseTrainer with `recovery=",
    ),
    (
        lambda: beside_reconstruction(PruningCallback(0.7), "none"),
        ValueError,
        "A PruningCallback acts .* `recovery='none'` .* set `sparsity` or `pattern`",
    ),
    (reconstructed_again, ValueError, "stopped in the middle of the reconstruction, .* Make a new SparseTrainer with"),
    (
        lambda: trained(adapted().merge_and_unload(), sparsity=0.5),
        ValueError,
        "All parameters of this LlamaForCausalLM are frozen, .* Call `model.requires_grad_",
    ),
    (terminated_in_a_thread, ValueError, "in the main thread alone, .* runs in the thread 'worker'. Call `train`"),
    (
        lambda: hidden_states_loss([torch.ones(1, 5, 4)], [torch.ones(1, 5, 4)], torch.ones(1).bool()),
        ValueError,
        r"one vector per label. Got 1 of shape \[\(1, 5, 4\)\] .* Use distillation=",
    ),
    (
        lambda: sum_of_losses("logits", (torch.ones(2), torch.ones(2, 3)), {}, torch.ones(2).bool(), 1.0),
        ValueError,
        "reads `logits` from the outputs of model and teacher, and got a tuple without them. Let both models return",
    ),
    (lambda: FreezingCallback("thaw"), ValueError, "Expected `mode` 'freeze' or 'unfreeze', .* Got 'thaw' and 1"),
    (lambda: freeze(llama(), sharded=True), ValueError, "Frozen blocks have no gradients. .* `ddp_find_unused_param"),
    (
        lambda: freeze(llama().requires_grad_(False)),
        ValueError,
        "None of the 3 blocks of this LlamaForCausalLM has a trained",
    ),
    (guarded_vandalism, RuntimeError, "'model.layers.2.mlp.up_proj' lost zeros"),
    (
        lambda: check_fingerprints({"a": "2x2:2:f"}, {"a": "2x2:2:e"}, ["a"]),
        ValueError,
        "masks of the checkpoint and of the model differ in 1 weights, the first of which is 'a'",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()

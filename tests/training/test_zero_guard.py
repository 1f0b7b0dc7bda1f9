"""Full fine-tuning of a pruned model: every weight is trained, no zero is filled."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.utils import prune as masking
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparse import MaskLoRAConfig, PruningCallback, SparseTrainer, ZeroGuardCallback, prune, sparsity
from peft_sparse.model.blocks import prunable_weights

from checks import assert_same_zeros, assert_zeros_kept, zeros_of
from conftest import Samples, tiny
from trainers import arguments


class Watch(TrainerCallback):
    """Looks at every weight right after each optimiser step."""

    def __init__(self, zeros):
        self.zeros, self.steps = zeros, 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert_zeros_kept(model, self.zeros)
        self.steps += 1


class Mixing(torch.optim.SGD):
    """Adds to every entry the mean step of its row, as optimisers that mix entries do."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.mean(-1, keepdim=True), alpha=-group["lr"])


def pruned(family="llama", dtype=torch.float32):
    model = tiny(family).to(dtype)
    prune(model, 0.5)
    return model


def momenta(trainer):
    """(weight name, zeros, state) of every state tensor laid out as a prunable weight that is a parameter."""
    for name, weight in prunable_weights(trainer.model).items():
        if weight.expert is None:
            for value in trainer.optimizer.state[weight.storage].values():
                if isinstance(value, torch.Tensor) and value.shape == weight.storage.shape:
                    yield name, weight.storage == 0, value


OPTIMIZERS = {
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [*((name, torch.float32) for name in OPTIMIZERS), ("adamw", torch.bfloat16)], ids=str
)
def test_zeros_stay_after_every_step_of(tmp_path, optimizer, dtype):
    model = pruned(dtype=dtype)
    before = {name: weight.matrix().clone() for name, weight in prunable_weights(model).items()}
    zeros = zeros_of(model)
    watch = Watch(zeros)
    args = arguments(tmp_path, gradient_accumulation_steps=2, **OPTIMIZERS[optimizer])
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == 6
    changed = [name for name, w in prunable_weights(model).items() if not torch.equal(w.matrix(), before[name])]
    assert changed if dtype == torch.bfloat16 else len(changed) == 21
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, entries, state in momenta(trainer):
        assert (state[entries & zeros[name]] == 0).all(), name
        assert state.any(), name


def test_an_optimizer_that_mixes_entries_fills_none(tmp_path):
    model = pruned()
    zeros = zeros_of(model)
    optimizer = Mixing(model.parameters(), lr=0.1)
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=Samples(), optimizers=(optimizer, None))
    trainer.add_callback(Watch(zeros))
    trainer.train()
    assert_same_zeros(model, zeros)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_any_storage_keeps_its_zeros(tmp_path, family):
    model = pruned(family)
    zeros = zeros_of(model)
    SparseTrainer(model, arguments(tmp_path, max_steps=2, weight_decay=0.1), train_dataset=Samples()).train()
    assert_same_zeros(model, zeros)


def test_it_trains_as_if_the_mask_were_part_of_the_model(tmp_path):
    """As PERP's own FullFT: `torch.nn.utils.prune`, whose gradients and norms are of kept entries alone."""
    model, reference = pruned(), pruned()
    for weight in prunable_weights(reference).values():
        masking.custom_from_mask(weight.layer, "weight", weight.storage != 0)
    options = {"max_grad_norm": 0.05, "optim": "adamw_torch"}
    trainer = SparseTrainer(model, arguments(tmp_path, **options), train_dataset=Samples())
    trainer.train()
    other = Trainer(reference, arguments(tmp_path, TrainingArguments, **options), train_dataset=Samples())
    other.train()
    for weight in prunable_weights(reference).values():
        masking.remove(weight.layer, "weight")
    expected = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (trainer, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_momentum_of_newly_pruned_entries_is_cleared(tmp_path):
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    model(input_ids=Samples().tokens, labels=Samples().tokens).loss.backward()
    optimizer.step()
    args = arguments(tmp_path, sparsity=0.5, max_steps=2)
    trainer = SparseTrainer(model, args, train_dataset=Samples(), optimizers=(optimizer, None))
    trainer.train()
    found = list(momenta(trainer))
    assert len(found) == 3 * 21
    assert all((state[zeros] == 0).all() and state.any() for _, zeros, state in found)


@pytest.mark.parametrize("before", [True, False], ids=["pruned before", "pruned by the trainer"])
def test_a_pruned_layer_in_modules_to_save_keeps_its_zeros(tmp_path, before):
    """PEFT trains a copy of the whole layer, which is what merging leaves."""
    config = MaskLoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(pruned() if before else tiny("llama"), config)
    args = arguments(tmp_path, weight_decay=0.1, **({} if before else {"sparsity": 0.5}))
    trainer = SparseTrainer(model, args, train_dataset=Samples())
    watch = Watch(zeros_of(model))
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == 6
    merged = model.merge_and_unload()
    assert sparsity(merged) == 0.5
    assert all((layer.mlp.down_proj.weight == 0).float().mean() == 0.5 for layer in merged.model.layers)


def test_the_guard_serves_a_plain_trainer(tmp_path):
    model = tiny("llama")
    args = arguments(tmp_path, TrainingArguments, weight_decay=0.1)
    callbacks = [PruningCallback("2:4"), ZeroGuardCallback()]
    Trainer(model, args, train_dataset=Samples(), callbacks=callbacks).train()
    assert sparsity(model) == 0.5
    assert all(parameter._backward_hooks in (None, {}) for parameter in model.parameters()), "hooks stayed"


def test_a_second_training_keeps_zeros_too(tmp_path):
    model = pruned()
    trainer = SparseTrainer(model, arguments(tmp_path), train_dataset=Samples())
    trainer.train()
    zeros = zeros_of(model)
    trainer.train()
    assert_same_zeros(model, zeros)


def test_only_the_trained_weights_are_touched(tmp_path):
    model = get_peft_model(pruned(), MaskLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    down = model.get_base_model().model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    guard = ZeroGuardCallback()
    args = arguments(tmp_path, TrainingArguments, max_steps=2)
    before = down.detach().clone()
    zeros = zeros_of(model)
    Trainer(model, args, train_dataset=Samples(), callbacks=[guard]).train()
    assert list(guard.trained) == ["model.layers.0.mlp.down_proj"]
    assert not torch.equal(down, before)
    assert_same_zeros(model, zeros)

"""Learning from the dense model: the losses by hand, and what the Trainer makes of them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_sparse import MaskLoRAConfig, SparseTrainer, prune, sparsity
from peft_sparse.training import distillation
from peft_sparse.training.distillation import hidden_states_loss, logits_loss, predictions

from checks import assert_same_weights, assert_same_zeros, zeros_of
from conftest import Samples, tiny
from trainers import arguments, in_two_processes


KINDS = ("logits", "hidden_states")


class Uneven(torch.utils.data.Dataset):
    """Sequences of one length, of which more and more tokens have no label."""

    def __init__(self, count=8):
        self.tokens = Samples(count).tokens

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        labels = self.tokens[index].clone()
        labels[: index % 5 + 1] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


def dense(family="llama"):
    """A model whose blocks matter: freshly drawn they add next to nothing, and pruning changes little."""
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def pruned(family="llama"):
    model = dense(family)
    prune(model, 0.5)
    return model


def trainer(
    path,
    model,
    dataset=None,
    teacher=None,
    kind="logits",
    callbacks=None,
    batch=4,
    peft_config=None,
    compute_loss_func=None,
    **options,
):
    args = arguments(path, distillation=kind, **options)
    args.per_device_train_batch_size = batch
    data = {"train_dataset": dataset or Samples(), "callbacks": callbacks, "compute_loss_func": compute_loss_func}
    return SparseTrainer(model, args, **data, teacher=teacher, peft_config=peft_config)


def reference(student, teacher, kept, temperature):
    ours, theirs = ((logits[kept].double() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum()


def test_divergence_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(9), 0.0]])
    kept = torch.tensor([True])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert logits_loss(student, teacher, kept).item() == pytest.approx(expected, rel=1e-6)
    # At temperature 2 the odds are 3 : 1.
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert logits_loss(student, teacher, kept, 2.0).item() == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 9), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_value_and_gradient_are_those_of_the_formula_by_any_chunks(batch, length, classes, temperature, chunk):
    generator = torch.Generator().manual_seed(batch * length + classes)
    student, teacher = (torch.randn(batch, length, classes, generator=generator) for _ in range(2))
    kept = torch.rand(batch, length, generator=generator) < 0.7
    student.requires_grad_(True)
    other = student.detach().clone().requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "CHUNK", chunk)
        found = logits_loss(student, teacher, kept, temperature)
        (3 * found).backward()
    expected = reference(other, teacher, kept, temperature)
    (3 * expected).backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_what_does_not_count_may_be_anything():
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    student[1] = torch.nan
    student.requires_grad_(True)
    loss = logits_loss(student, teacher, torch.tensor([True, False]))
    loss.backward()
    assert loss.isfinite()
    assert (student.grad[1] == 0).all()
    assert student.grad[0].all()


def test_half_precision_gives_a_gradient_in_half_precision():
    student, teacher = torch.randn(4, 9).bfloat16().requires_grad_(True), torch.randn(4, 9)
    kept = torch.ones(4).bool()
    loss = logits_loss(student, teacher, kept)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, reference(student, teacher, kept, 1.0).float(), rtol=1e-4, atol=1e-5)


def test_errors_of_hidden_states_by_hand():
    teacher = [torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])]
    student = [torch.tensor([[3.0, 3.0], [1.0, 2.0], [9.0, 9.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])]
    kept = torch.tensor([True, True, False])
    # 1 / 25 and 1 / 4 after the first block, 1 and 0 after the second.
    assert hidden_states_loss(student, teacher, kept).item() == pytest.approx((1 / 25 + 1 / 4 + 1) / 2, rel=1e-6)


class ByTrainer(nn.Module):
    """A model of no library without a loss, which is computed by the trainer."""

    def __init__(self):
        super().__init__()
        self.inner = dense()

    def forward(self, input_ids, labels=None):
        return {"logits": self.inner(input_ids=input_ids).logits}


class Unshifted(ByTrainer):
    """A model of no library whose loss compares label and output at the same position."""

    def forward(self, input_ids, labels=None):
        logits = self.inner(input_ids=input_ids).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits.transpose(1, 2), labels)
        return {"loss": loss, "logits": logits}


def shifted_loss(outputs, labels, num_items_in_batch=None):
    costs = nn.functional.cross_entropy(outputs["logits"][:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return costs / num_items_in_batch


class Prompted(torch.utils.data.Dataset):
    """Sequences of which the first half, the prompt, has no label."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        tokens = Samples().tokens[index]
        return {"input_ids": tokens, "labels": tokens.where(torch.arange(10) > 4, -100)}


@pytest.mark.parametrize(
    ("make", "offset", "options"),
    [
        (lambda: dense("gpt2"), 1, {}),
        (dense, 1, {"label_smoothing_factor": 0.3}),
        (Unshifted, 0, {}),
        (Unshifted, 0, {"gradient_accumulation_steps": 2, "batch": 2}),
        (ByTrainer, 1, {"compute_loss_func": shifted_loss}),
        (Unshifted, 1, {"compute_loss_func": shifted_loss}),
    ],
    ids=["GPT-2", "label smoothing", "plain", "accumulated", "loss of the trainer", "another loss of the trainer"],
)
def test_the_outputs_that_count_are_those_that_the_task_loss_reads(tmp_path, make, offset, options):
    teacher, model = make(), make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    batch = {name: torch.stack([Prompted()[i][name] for i in range(4)]) for name in ("input_ids", "labels")}
    ours, theirs = (m.eval()(input_ids=batch["input_ids"])["logits"].detach() for m in (model, teacher))
    kept = torch.zeros(4, 10).bool()
    kept[:, 5 - offset : 10 - offset] = True
    runs = []
    model.register_forward_hook(lambda module, args, outputs: runs.append(module.training))
    steps = {"max_steps": 2, "logging_steps": 1, "distillation_weight": 1.0, "learning_rate": 0.0}
    run = trainer(tmp_path, model.train(), Prompted(), teacher, **steps, **options)
    run.train()
    expected = reference(ours, theirs, kept, 1.0) / kept.sum()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    # Tried before the first step only, in evaluation mode.
    assert [runs[0], runs[-1]] == [False, True]
    assert runs == sorted(runs)


def test_labels_of_outputs_need_no_trial():
    labels = torch.tensor([[3, -100, 5]])
    found = predictions({"shift_labels": labels, "labels": labels.roll(1)}, offset=None)
    assert torch.equal(found, labels != -100)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_mixed_as_documented(tmp_path, kind):
    teacher, model = dense(), pruned()
    batch = {"input_ids": Samples(4).tokens, "labels": Samples(4).tokens}
    outputs, taught = (m(**batch, output_hidden_states=True) for m in (model, teacher))
    kept = torch.ones(4, 10).bool()
    kept[:, -1] = False
    if kind == "logits":
        extra = reference(outputs.logits, taught.logits, kept, 2.0) / kept.sum()
    else:
        pairs = zip(outputs.hidden_states[1:], taught.hidden_states[1:], strict=True)
        ratios = [((s - t).square().sum(-1) / t.square().sum(-1))[kept].mean() for s, t in pairs]
        extra = sum(ratios) / len(ratios)
    run = trainer(
        tmp_path, model, Samples(4), teacher, kind, max_steps=1, logging_steps=1, distillation_weight=0.3,
        distillation_temperature=2.0,
    )  # fmt: skip
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.7 * outputs.loss.item() + 0.3 * extra.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "counted"), [("logits", True), ("hidden_states", False)], ids=["loss by all tokens", "loss by batch"]
)
def test_batches_of_two_are_two_batches_of_one(tmp_path, kind, counted):
    runs = []
    for batch in (2, 1):
        model = pruned()
        model.accepts_loss_kwargs = counted
        data = Uneven() if counted else Samples(8)
        options = {"batch": batch, "gradient_accumulation_steps": 2 // batch, "optim": "sgd"}
        run = trainer(tmp_path, model, data, dense(), kind, max_steps=3, logging_steps=1, **options)
        run.train()
        runs.append(run)
    for found, expected in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def trained_with_uneven_batches(folder, kind, batch):
    run = trainer(folder / kind, pruned(), Uneven(), dense(), kind, batch=batch, max_steps=3, optim="sgd")
    run.train()
    return run


def train_in_one_of_two_processes(folder):
    for kind in KINDS:
        run = trained_with_uneven_batches(Path(folder), kind, 2)
        if run.is_world_process_zero():
            torch.save(run.model.state_dict(), Path(folder) / f"{kind}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one_on_their_batches_together(tmp_path):
    in_two_processes(tmp_path, __file__, f"train_in_one_of_two_processes({str(tmp_path)!r})")
    for kind in KINDS:
        found = torch.load(tmp_path / f"{kind}.pt")
        for name, expected in trained_with_uneven_batches(tmp_path, kind, 4).model.state_dict().items():
            torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(("kind", "adapted"), [("logits", True), ("hidden_states", False)], ids=["MaskLoRA", "full"])
def test_a_pruned_model_comes_closer_to_the_dense_one(tmp_path, kind, adapted):
    def distance(model):
        tokens = Samples().tokens
        kept = torch.ones(tokens.shape).bool()
        with torch.no_grad():
            return logits_loss(model.eval()(input_ids=tokens).logits, teacher(input_ids=tokens).logits, kept).item()

    teacher, before = dense(), dense()
    model = pruned()
    zeros, start = zeros_of(model), distance(model)
    if adapted:
        model = get_peft_model(model, MaskLoRAConfig(r=4, target_modules="all-linear", train_norms=True))
    trainer(
        tmp_path, model, Samples(), teacher, kind, distillation_weight=1.0, learning_rate=2e-3, max_steps=9
    ).train()
    assert distance(model) < 0.8 * start
    assert_same_zeros(model, zeros)
    assert_same_weights(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_trainer_keeps_a_dense_copy_without_adapters_when_it_prunes(tmp_path):
    config = MaskLoRAConfig(r=2, target_modules="all-linear", train_norms=True, init_weights=False)
    run = trainer(tmp_path, dense(), sparsity=0.5, max_steps=2, peft_config=config)
    run.train()
    assert sparsity(run.model) == 0.5
    assert_same_weights(run.teacher, dense())
    assert len(list(run.model.parameters())) > len(list(run.teacher.parameters()))


def test_the_teacher_runs_without_dropout_and_stays_in_its_mode(tmp_path):
    teacher = dense("gpt2").train()
    seen = []
    teacher.transformer.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, torch.is_grad_enabled()))
    )
    trainer(tmp_path, pruned("gpt2"), Samples(), teacher, max_steps=1).train()
    assert seen == [(False, False)]
    assert teacher.training


def test_losses_in_evaluation_are_the_tasks(tmp_path):
    model = pruned()
    args = arguments(tmp_path, distillation="logits")
    run = SparseTrainer(model, args, train_dataset=Samples(), eval_dataset=Samples(4), teacher=dense())
    tokens = Samples(4).tokens
    assert run.evaluate()["eval_loss"] == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_decoders_learn_too(tmp_path, kind):
    data = [{"input_ids": row, "labels": row[:6]} for row in Samples(8).tokens]
    trainer(tmp_path, pruned("t5"), data, dense("t5"), kind, max_steps=2).train()


def test_image_classifiers_learn_from_logits(tmp_path):
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(8)]
    trainer(tmp_path, pruned("vit"), data, dense("vit"), max_steps=2).train()


def test_a_teacher_in_half_precision_will_do(tmp_path):
    teacher = dense().bfloat16()
    run = trainer(tmp_path, pruned(), Samples(), teacher, max_steps=2)
    run.train()
    assert isinstance(run.teacher, nn.Module)
    assert run.teacher.dtype == torch.bfloat16

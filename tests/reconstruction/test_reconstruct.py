"""Reconstruction against its definition, computed on the finished model; and what it must leave alone."""

import copy
import functools
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, get_linear_schedule_with_warmup

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, prune, reconstruct, sparsity
from peft_sparse.calibration.runner import BlockRunner
from peft_sparse.model.blocks import find_blocks, find_stacks, prunable_weights
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.reconstruction import reconstruct_checkpoint
from peft_sparse.reconstruction.fitting import Recipe, Step, fit, held_out_batches, region_loss
from peft_sparse.reconstruction.regions import Region, regions_of_blocks, regions_of_submodules
from peft_sparse.reconstruction.work import showing_loss

from checks import assert_same_weights, assert_same_zeros, assert_zeros_kept, inputs_by_hooks, named, zeros_of
from conftest import SIZES, inputs_of, tiny
from trainers import importing, in_two_processes


def lively(family):
    """A tiny model whose blocks do more than hand on what they are given."""
    model, generator = tiny(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def batches_of(family, count=3, size=2):
    batch = inputs_of(family, count * size)
    return [{name: rows[i : i + size] for name, rows in batch.items()} for i in range(0, count * size, size)]


def rebuild(model, calibration, **options):
    defaults = {"pattern": 0.5, "learning_rate": 5e-3, "max_steps": 6, "holdout": 0}
    return reconstruct(model, calibration, **(defaults | options))


# -- errors, by definition -------------------------------------------------------------------------------------------


class Pass:
    """The states of a model on their own way through its blocks: the hidden states before the next, and its calls."""

    def __init__(self, model, stack, inputs):
        self.runner, self.stack = BlockRunner(model, stack, inputs), stack
        self.hidden = [batch.hidden for batch in self.runner.batches]

    def calls(self, first, count):
        return [batch.calls[first : first + count] for batch in self.runner.batches]

    def advance(self, first, count):
        for index in range(first, first + count):
            self.runner.advance(index)
        self.hidden = [batch.hidden for batch in self.runner.batches]


def regions_at(size, way, first):
    blocks = dict(list(way.stack.items())[first : first + (size if isinstance(size, int) else 1)])
    if size != "submodule":
        return regions_of_blocks(blocks, first)
    ((name, block),) = blocks.items()
    return regions_of_submodules(name, block, first, way.hidden[0], way.calls(first, 1)[0][0])


@torch.no_grad()
def errors_by_definition(model, dense, inputs, size, mode, measured=slice(None)):
    """||f(x) - t|| / ||t|| of every region of the finished model."""
    errors = []
    for number, stack in enumerate(find_stacks(model)):
        sparse, full = Pass(model, stack, inputs), Pass(dense, find_stacks(dense)[number], inputs)
        step = size if isinstance(size, int) else 1
        for first in range(0, len(stack), step):
            count = min(step, len(stack) - first)
            # What the student and the teacher are fed, before the second part of a block what the first part made.
            fed = {way: list(way.hidden) for way in (sparse, full)}
            for region, taught_by in zip(regions_at(size, sparse, first), regions_at(size, full, first), strict=True):

                def outputs(which, way, first=first, count=count, fed=fed):
                    return [which(x, c) for x, c in zip(fed[way], way.calls(first, count), strict=True)]

                found = outputs(region, full if mode == "DD" else sparse)[measured]
                targets = outputs(taught_by, sparse if mode == "SS" else full)[measured]
                wrong = sum((one - other).square().sum() for one, other in zip(found, targets, strict=True))
                errors.append(float((wrong / sum(target.square().sum() for target in targets)).sqrt()))
                if region.joins is None:
                    fed = {sparse: outputs(region, sparse), full: outputs(taught_by, full)}
            sparse.advance(first, count)
            full.advance(first, count)
    return errors


def check(family, size, mode, calibration, **options):
    model, dense, pruned = lively(family), lively(family), lively(family)
    report = rebuild(model, calibration, region=size, mode=mode, **options)
    prune(pruned, 0.5)
    assert_same_zeros(model, zeros_of(pruned))
    expected = errors_by_definition(model, dense, calibration, size, mode)
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)
    assert all(region.error < region.error_pruned for region in report.regions)
    assert not any(region.reverted for region in report.regions)


def test_every_block_gets_better_by_what_the_report_says(family):
    check(family, "block", "SS", batches_of(family))


@pytest.mark.parametrize("mode", ["SD", "DD"])
@pytest.mark.parametrize("family", ["gemma3", "phi", "mixtral", "t5", "bart"])
def test_blocks_get_better_in_every_mode(family, mode):
    check(family, "block", mode, batches_of(family))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "phi", "gpt_neox", "mixtral", "gpt_oss", "vit"])
def test_attention_and_mlp_get_better_by_what_the_report_says(family):
    check(family, "submodule", "SS", batches_of(family))


@pytest.mark.parametrize("mode", ["SD", "DD"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_attention_and_mlp_get_better_in_every_mode(family, mode):
    check(family, "submodule", mode, batches_of(family))


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "SS"), ("t5", "SD"), ("bart", "DD")])
def test_windows_get_better_by_what_the_report_says(family, mode):
    check(family, 2, mode, batches_of(family))


def test_single_matrices_get_better(family):
    model, pruned = lively(family), lively(family)
    report = rebuild(model, batches_of(family), region="matrix")
    prune(pruned, 0.5)
    assert_same_zeros(model, zeros_of(pruned))
    assert {region.name for region in report.regions} == set(zeros_of(model))
    assert all(region.error < region.error_pruned for region in report.regions)
    assert all(region.steps == 0 for region in report.regions)


# -- one region ------------------------------------------------------------------------------------------------------


def test_a_linear_region_reaches_the_masked_least_squares_optimum(llama):
    """By gradient steps; `region="matrix"` gets there at once."""
    layer, X = torch.nn.Linear(12, 6, bias=False).double(), torch.randn(40, 12).double()
    target, mask = layer(X).detach(), layer.weight.detach().abs() > layer.weight.detach().abs().median()
    with torch.no_grad():
        layer.weight.mul_(mask)
    fit(
        Region("linear", 0, {}),
        lambda index, inputs: layer(inputs),
        lambda index: (X, target, None),
        [0],
        [layer.weight],
        {layer.weight: mask},
        recipe(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.3, momentum=0.9), max_steps=400),
        0,
    )
    for row, kept in enumerate(mask):
        best = torch.linalg.lstsq(X[:, kept], target[:, row]).solution
        torch.testing.assert_close(layer.weight[row, kept], best)
    assert (layer.weight[~mask] == 0).all()


def test_single_matrices_reach_their_optimum():
    """q, k and v of the first block, whose inputs no other matrix changes."""
    model, dense, tokens = lively("llama"), lively("llama"), batches_of("llama")
    rebuild(model, tokens, region="matrix", mode="SS")
    inputs = inputs_by_hooks(dense, tokens)
    for kind in "qkv":
        name = f"model.layers.0.self_attn.{kind}_proj"
        X, W, found = inputs[name].double(), weight_of(dense, name), weight_of(model, name)
        ridge = 0.01 * (X.T @ X).diagonal().mean().sqrt() ** 2
        extended = torch.cat([X, ridge.sqrt() * torch.eye(X.shape[1])])
        for row, kept in enumerate(found != 0):
            best = torch.linalg.lstsq(extended[:, kept], extended @ W[row]).solution
            torch.testing.assert_close(found[row, kept], best, rtol=1e-2, atol=1e-3)


def test_in_mode_ss_a_matrix_is_solved_on_what_those_before_it_make():
    """The report's error of the last matrix of a block, on the inputs it has in the finished model."""
    model, dense, calibration = lively("llama"), lively("llama"), batches_of("llama")
    report = rebuild(model, calibration, region="matrix", mode="SS")
    inputs = inputs_by_hooks(model, calibration)
    for region in report.regions:
        X, W = inputs[region.name].double(), weight_of(dense, region.name)
        wrong = (X @ (weight_of(model, region.name) - W).T).norm() / (X @ W.T).norm()
        assert region.error == pytest.approx(float(wrong), rel=1e-3)


def test_in_mode_dd_a_matrix_is_solved_on_dense_inputs():
    model, dense, calibration = lively("llama"), lively("llama"), batches_of("llama")
    report = rebuild(model, calibration, region="matrix", mode="DD")
    inputs = inputs_by_hooks(dense, calibration)
    for region in report.regions:
        X, W = inputs[region.name].double(), weight_of(dense, region.name)
        wrong = (X @ (weight_of(model, region.name) - W).T).norm() / (X @ W.T).norm()
        assert region.error == pytest.approx(float(wrong), rel=1e-3)


def test_one_window_over_all_blocks_is_one_global_fit():
    """Against a loop on the model itself: the whole stack's outputs, full batches, the same optimiser and schedule."""
    calibration, steps, rate = batches_of("llama"), 5, 5e-3
    model, dense, by_hand = lively("llama"), lively("llama"), lively("llama")
    options = {"learning_rate": rate, "max_steps": steps, "gradient_accumulation_steps": len(calibration)}
    rebuild(model, calibration, region=3, **options)

    prune(by_hand, 0.5)
    parameters = dict(by_hand.model.layers.named_parameters())
    masks = {name: p.detach() != 0 for name, p in parameters.items() if "proj" in name}
    tokens = torch.cat([batch["input_ids"] for batch in calibration])
    target = stack_output(dense, tokens).detach()
    optimizer = torch.optim.AdamW(parameters.values(), rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    for _ in range(steps):
        (stack_output(by_hand, tokens) - target).square().mean().backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        optimizer.step()
        schedule.step()
        by_hand.zero_grad()
    for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def stack_output(model, tokens):
    """What the last block returns."""
    seen = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=tokens)
    hook.remove()
    return seen[0]


def weight_of(model, name):
    return prunable_weights(model)[name].matrix().double()


def in_block(name, parameter):
    return parameter.startswith(f"{name}.")


@pytest.mark.parametrize(
    ("family", "tuner", "criterion"),
    [("phi", "full", "wanda"), ("phi", "adapters", "random"), ("t5", "full", "random"), ("t5", "adapters", "wanda")],
)
def test_dd_regions_do_not_depend_on_one_another(family, tuner, criterion):
    """Each reconstructed alone, in a model that is dense elsewhere, comes out as it does among the others."""
    calibration, options = (
        batches_of(family),
        {"mode": "DD", "region": "block", "criterion": criterion, "max_steps": 3},
    )
    options["tuner"] = tuner if tuner == "full" else MaskLoRAConfig(r=2)
    together = lively(family)
    rebuild(together, calibration, **options)
    for name in reversed(find_blocks(together)):
        torch.rand(7)
        alone = lively(family)
        rebuild(alone, calibration, target_modules=re.escape(name) + r"\..*", **options)
        untouched = lively(family)
        for (key, found), expected, before in zip(
            alone.named_parameters(), together.parameters(), untouched.parameters(), strict=True
        ):
            assert torch.equal(found, expected if in_block(name, key) else before), key


def test_what_lies_outside_the_region_stays():
    model, before = lively("llama"), lively("llama")
    rebuild(model, batches_of("llama"), target_modules=r".*\.1\.self_attn\.[qkvo]_proj")
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = {name for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed == {f"model.layers.1.{name}" for name in ATTENTION}


ATTENTION = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
]


# -- steps and batches -----------------------------------------------------------------------------------------------


def recipe(**options):
    defaults = {
        "tuner": "full",
        "loss": "mse",
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "epochs": 1,
        "max_steps": None,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": None,
        "autocast": None,
        "seed": 0,
        "on_step": None,
    }
    return Recipe(**defaults | options)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.sampled_from([0.1, 0.5, 1, 1.5, 2, 3]),
    max_steps=st.none() | st.integers(1, 12),
)
def test_exactly_the_promised_number_of_steps_is_taken(count, accumulation, epochs, max_steps):
    layer, taken, told, drawn = torch.nn.Linear(2, 2), [], [], []

    class Spy(torch.optim.SGD):
        def step(self, *args, **kwargs):
            taken.append(len(drawn))
            return super().step(*args, **kwargs)

    def pair(index):
        drawn.append(index)
        return torch.randn(1, 3, 2), torch.randn(1, 3, 2), None

    steps = fit(
        Region("r", 0, {}),
        lambda index, inputs: layer(inputs),
        pair,
        list(range(10, 10 + count)),
        list(layer.parameters()),
        {},
        recipe(
            optimizer=lambda parameters: Spy(parameters, 0.1),
            epochs=epochs,
            max_steps=max_steps,
            gradient_accumulation_steps=accumulation,
            on_step=told.append,
        ),
        0,
    )
    windows = -(-count // accumulation)
    assert len(taken) == steps == (max_steps or max(1, math.ceil(epochs * windows)))
    assert [step.number for step in told] == list(range(1, steps + 1))
    assert {step.of for step in told} == {steps}
    # Every batch once in each epoch, and never more than asked for in one step.
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert len(set(epoch)) == len(epoch)
    assert all(after - before <= accumulation for before, after in zip([0, *taken], taken, strict=False))
    assert taken == [count * (i // windows) + min((i % windows + 1) * accumulation, count) for i in range(steps)]


@pytest.mark.parametrize("options", [{"epochs": 2, "max_steps": None}, {"max_steps": 5}])
@pytest.mark.parametrize("holdout", [0, 0.4])
def test_what_is_promised_at_the_start_is_what_each_region_takes(options, holdout):
    promised, told, reports = [], [], []
    report = rebuild(
        lively("llama"),
        torch.cat([batch["input_ids"] for batch in batches_of("llama", 5, 1)]),
        gradient_accumulation_steps=2,
        holdout=holdout,
        on_start=promised.append,
        on_step=told.append,
        on_region=reports.append,
        **options,
    )
    steps = options["max_steps"] or 2 * (3 if holdout == 0 else 2)
    assert promised == [steps]
    assert [region.steps for region in report.regions] == [steps] * 6
    assert [(step.region, step.number) for step in told] == [
        (region.name, number + 1) for region in report.regions for number in range(steps)
    ]
    assert tuple(reports) == report.regions


def test_the_order_is_drawn_from_the_seed_and_nothing_else():
    def order(seed, number):
        torch.rand(3)
        drawn, layer = [], torch.nn.Linear(1, 1)

        def pair(index):
            drawn.append(index)
            return torch.ones(1, 1, 1), torch.ones(1, 1, 1), None

        fit(
            Region("r", 0, {}), lambda index, x: layer(x), pair, list(range(8)), list(layer.parameters()), {},
            recipe(seed=seed, epochs=2), number,
        )  # fmt: skip
        return drawn

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3
    assert order(0, 0)[:8] != order(0, 0)[8:]


def padded(tokens, kept, fill=0, side="right"):
    """Model inputs whose rows keep their first so many tokens, the rest being padding."""
    ids, mask = torch.full_like(tokens, fill), torch.zeros_like(tokens)
    for row, count in enumerate(kept):
        place = slice(0, count) if side == "right" else slice(tokens.shape[1] - count, None)
        ids[row, place], mask[row, place] = tokens[row, :count], 1
    return {"input_ids": ids, "attention_mask": mask}


SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5), "max_steps": None, "epochs": 3}


def assert_close_weights(model, other, rtol=1e-4, atol=1e-5):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("loss", "lengths", "size", "accumulation"),
    [
        ("mse", (12, 12, 12, 12), 1, 4),
        ("mse", (12, 5, 9, 2), 2, 2),
        ("mse", (12, 5, 9, 2), 3, 2),
        ("relative_mse", (12, 5, 9, 2), 1, 4),
        ("cosine", (12, 5, 9, 2), 3, 2),
    ],
)
def test_accumulated_batches_are_one_large_batch(loss, lengths, size, accumulation, tokens):
    """Weighted by their tokens: neither how sequences are batched nor how they are padded changes a step."""
    whole = padded(tokens[:4], lengths)
    parts = [{name: rows[i : i + size] for name, rows in whole.items()} for i in range(0, 4, size)]
    one, other = lively("llama"), lively("llama")
    options = SGD | {"loss": loss}
    expected = rebuild(one, [whole], **options)
    report = rebuild(other, parts, gradient_accumulation_steps=accumulation, **options)
    assert_close_weights(other, one)
    assert [r.error for r in report.regions] == pytest.approx([r.error for r in expected.regions], rel=1e-3)
    assert [r.error_pruned for r in report.regions] == pytest.approx(
        [r.error_pruned for r in expected.regions], rel=1e-3
    )


def test_a_tensor_in_batches_is_the_sequences_one_by_one(tokens):
    one, other = lively("llama"), lively("llama")
    rebuild(one, tokens, batch_size=2, gradient_accumulation_steps=3, **SGD)
    rebuild(other, tokens, batch_size=1, gradient_accumulation_steps=6, **SGD)
    assert_close_weights(one, other)


@pytest.mark.parametrize(
    ("family", "region", "changed"),
    [
        ("llama", "submodule", {"fill": 7}),
        ("llama", "submodule", {"side": "left"}),
        ("llama", "matrix", {"fill": 7}),
        ("phi", "matrix", {"side": "left"}),
    ],
)
def test_padding_has_no_say(family, region, changed, tokens):
    lengths = (12, 5, 9, 2, 11, 3)
    models = lively(family), lively(family)
    options = SGD if region == "submodule" else {}
    for model, how in zip(models, ({}, changed), strict=True):
        batch = padded(tokens, lengths, **how)
        rebuild(model, [batch], region=region, criterion="wanda", **options)
    assert_close_weights(*models, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_of_an_encoder_has_no_say_in_what_its_decoder_is_pruned_by(dtype, tokens):
    """Also in the second block of a window, and where both sides are as long."""
    zeros = []
    for fill in (0, 7):
        encoder = padded(tokens, (12, 5, 9, 2, 11, 3), fill)
        model = lively("bart").to(dtype)
        batch = encoder | {"decoder_input_ids": tokens}
        rebuild(model, [batch], region=2, criterion="wanda", max_steps=0)
        zeros.append(zeros_of(model))
    assert all(torch.equal(zeros[0][name], zeros[1][name]) for name in zeros[0])


def test_a_batch_of_nothing_but_padding_changes_nothing(tokens):
    batches = [padded(tokens[:2], (12, 5)), padded(tokens[2:4], (0, 0)), padded(tokens[4:], (7, 7))]
    one, other = lively("llama"), lively("llama")
    for model, calibration in ((one, batches), (other, [batches[0], batches[2]])):
        report = rebuild(model, calibration, gradient_accumulation_steps=len(calibration), **SGD)
        assert all(region.error < region.error_pruned for region in report.regions)
    assert_close_weights(one, other)


def test_losses_are_these():
    outputs = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
    target = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [1.0, 1.0]]])
    keep = torch.tensor([[True, True, False]])

    def terms(keep, loss):
        return [float(term) for term in region_loss(outputs, target, keep, loss)]

    assert terms(keep, "mse") == pytest.approx([4 + 9 + 16, 4])
    assert terms(keep, "relative_mse") == pytest.approx([4 + 9 + 16, 1 + 16])
    assert terms(keep, "cosine") == pytest.approx([(1 - 5**-0.5) + 1, 2])
    assert terms(None, "mse") == pytest.approx([4 + 9 + 16 + 64 + 64, 6])
    # A mask of another shape is that of another stack's tokens.
    assert terms(keep[:, :2], "mse") == terms(None, "mse")


@pytest.mark.parametrize("loss", ["mse", "relative_mse", "cosine"])
def test_every_loss_brings_the_error_down(loss):
    told = []
    report = rebuild(lively("llama"), batches_of("llama"), loss=loss, epochs=6, max_steps=None, on_step=told.append)
    assert all(region.error < region.error_pruned for region in report.regions)
    first = [float(step.loss) for step in told if step.region == report.regions[0].name]
    assert 0 < first[-1] < first[0]
    assert report.loss == loss


# -- training ends where it should -----------------------------------------------------------------------------------


def test_dropout_is_off_and_comes_back():
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3)

    def model():
        torch.manual_seed(0)
        return OPTForCausalLM(config)

    calibration, models = batches_of("opt"), [model().train(), model().train(), model().eval()]
    models[0].model.decoder.layers[1].fc1.eval()
    modes = [{name: module.training for name, module in model.named_modules()} for model in models]
    for number, one in enumerate(models):
        torch.manual_seed(number)
        rebuild(one, calibration)
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])
    assert [{name: module.training for name, module in model.named_modules()} for model in models] == modes


def test_dropout_of_a_dense_teacher_is_off_as_well():
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3)

    def rebuilt(training):
        torch.manual_seed(0)
        dense = OPTForCausalLM(config).train(training)
        model = copy.deepcopy(dense)
        prune(model, 0.5)
        rebuild(model, batches_of("opt"), pattern=None, dense=dense)
        assert dense.training == training
        return model

    assert_same_weights(rebuilt(True), rebuilt(False))


TUNERS = {
    "full": "full",
    "MaskLoRA": MaskLoRAConfig(r=4),
    "MaskLoRA with dropout": MaskLoRAConfig(r=4, lora_dropout=0.1),
    "ScaledLoRA": ScaledLoRAConfig(r=4),
    "LoRA-Prune": MaskLoRAConfig(r=4, masking="merge"),
    "PERP": MaskLoRAConfig(r=4, train_norms=True, bias="all"),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("family", "mode"), [("opt", "DD"), ("gpt2", "SS")])
def test_every_tuner_is_merged_into_plain_modules(family, tuner, mode):
    calibration, model, dense = batches_of(family), lively(family), lively(family)
    structure, names = str(model), list(model.state_dict())
    flags = [
        parameter.requires_grad_(index % 3 > 0).requires_grad for index, parameter in enumerate(model.parameters())
    ]
    options = {"tuner": TUNERS[tuner], "mode": mode, "region": "block", "max_steps": 9}
    report = rebuild(model, calibration, **options)
    assert (str(model), list(model.state_dict())) == (structure, names)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    pruned = lively(family)
    prune(pruned, 0.5)
    assert_same_zeros(model, zeros_of(pruned))
    # What is reported is what the merged model does.
    expected = errors_by_definition(model, dense, calibration, "block", mode)
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)
    assert sum(expected) < sum(region.error_pruned for region in report.regions)


@pytest.mark.parametrize(
    ("tuner", "trained"),
    [
        ("full", {"weight", "bias", "norm"}),
        (MaskLoRAConfig(r=4), {"weight"}),
        (MaskLoRAConfig(r=4, train_norms=True), {"weight", "norm"}),
        (ScaledLoRAConfig(r=4, bias="all"), {"weight", "bias", "norm bias"}),
        (MaskLoRAConfig(r=4, bias="mask_lora_only"), {"weight", "bias"}),
        (MaskLoRAConfig(r=4, target_modules=["fc1"], train_norms=True), {"fc1", "norm"}),
        (MaskLoRAConfig(r=4, target_modules=r".*\.fc1"), {"fc1"}),
        (MaskLoRAConfig(r=4, target_modules=["fc1", "fc2"], exclude_modules=["fc2"]), {"fc1"}),
        (MaskLoRAConfig(r=4, target_modules=["fc1"], layers_to_transform=[0, 1, 2]), {"fc1"}),
    ],
)
def test_a_tuner_trains_what_it_says(tuner, trained):
    model, pruned = lively("opt"), lively("opt")
    rebuild(model, batches_of("opt"), tuner=tuner)
    prune(pruned, 0.5)
    found = set()
    for (name, one), other in zip(model.named_parameters(), pruned.parameters(), strict=True):
        if not torch.equal(one, other):
            kind = "norm" if "layer_norm" in name else name.rpartition(".")[2]
            kind = "norm bias" if kind == "norm" and trained & {"norm bias"} else kind
            found.add("fc1" if "fc1" in trained and "fc1.weight" in name else kind)
            assert ".layers." in name
    assert found == trained


@pytest.mark.parametrize("tuner", ["full", "MaskLoRA", "PERP"])
def test_the_optimiser_is_given_what_belongs_to_the_region_in_turn(tuner):
    model, given = lively("opt"), []

    def spy(parameters):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        given.append({names[id(parameter)] for parameter in parameters})
        return torch.optim.SGD(parameters, 0.1)

    rebuild(model, batches_of("opt"), tuner=TUNERS[tuner], optimizer=spy, max_steps=1)
    for number, names in enumerate(given):
        parts = ("fc", "final") if number % 2 else ("self_attn",)
        assert all(
            name.startswith(tuple(f"model.decoder.layers.{number // 2}.{part}" for part in parts)) for name in names
        )
        kinds = {name.rpartition(".")[2] for name in names if "_lora_" not in name}
        assert kinds == (set() if tuner == "MaskLoRA" else {"weight", "bias"})
        assert any("_lora_" in name for name in names) == (tuner != "full")
    assert len(given) == 6


def test_an_optimiser_that_moves_every_entry_fills_no_zero():
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1e-4)

    model, pruned = lively("llama"), lively("llama")
    report = rebuild(model, batches_of("llama"), optimizer=lambda parameters: Noisy(parameters, 0.5))
    prune(pruned, 0.5)
    assert not all(region.reverted for region in report.regions)
    assert_same_zeros(model, zeros_of(pruned))


def test_layers_to_transform_are_those_of_the_model():
    model, pruned = lively("llama"), lively("llama")
    rebuild(model, batches_of("llama"), tuner=MaskLoRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    prune(pruned, 0.5)
    changed = {
        name for (name, p), q in zip(model.named_parameters(), pruned.parameters(), strict=True) if (p != q).any()
    }
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}


def test_patterns_of_ranks_name_layers_of_the_model():
    ranks = {}

    def spy(parameters):
        ranks.setdefault(tuple(p.shape for p in parameters), None)
        return torch.optim.SGD(parameters, 0.1)

    config = MaskLoRAConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3, "v_proj": 5})
    rebuild(lively("llama"), batches_of("llama"), tuner=config, optimizer=spy, region="block")
    assert [shapes[0][0] for shapes in ranks] == [2, 3]


def test_plain_lora_is_refused_because_it_fills_zeros():
    with pytest.raises(
        ValueError, match=r"filled zeros of 'model.layers.0.self_attn.q_proj' .* such as MaskLoRAConfig"
    ):
        rebuild(lively("llama"), batches_of("llama"), tuner=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def test_half_precision_is_kept_and_trained_in_full():
    model, calibration, dtypes = lively("llama").bfloat16(), batches_of("llama"), []
    model.model.layers[1].input_layernorm.float()
    expected = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def spy(parameters):
        dtypes.extend(parameter.dtype for parameter in parameters)
        return torch.optim.AdamW(parameters, 5e-3)

    report = rebuild(model, calibration, optimizer=spy)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == expected
    assert set(dtypes) == {torch.float32}
    assert all(region.error < region.error_pruned for region in report.regions)
    assert sparsity(model) == 0.5


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_mixed_precision_brings_the_error_down(family):
    seen, model = [], lively(family)
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    report = rebuild(model, batches_of(family), autocast=torch.bfloat16)
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert all(region.error < region.error_pruned for region in report.regions)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradients_are_clipped():
    model = lively("llama")
    steps = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 1.0), "max_steps": 1, "region": "block"}
    rebuild(model, batches_of("llama"), max_grad_norm=1e-3, target_modules=r".*\.0\..*", **steps)
    pruned = lively("llama")
    prune(pruned, 0.5, target_modules=r".*\.0\..*")
    pairs = zip(model.parameters(), pruned.parameters(), strict=True)
    moved = sum((one - other).detach().square().sum() for one, other in pairs).sqrt()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("tuner", ["full", "MaskLoRA", "PERP"])
@pytest.mark.parametrize("region", ["submodule", "block"])
def test_what_got_worse_is_undone(tuner, region):
    model, pruned = lively("opt"), lively("opt")
    held = batches_of("opt", 5)
    report = rebuild(model, held, tuner=TUNERS[tuner], region=region, holdout=0.3, learning_rate=30.0)
    prune(pruned, 0.5)
    assert all(region.reverted for region in report.regions)
    assert [region.error for region in report.regions] == [region.error_pruned for region in report.regions]
    assert_same_weights(model, pruned)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert "reverted" in str(report)


def test_an_update_that_is_not_a_number_is_undone():
    model, pruned = lively("llama"), lively("llama")
    report = rebuild(model, batches_of("llama"), optimizer=lambda parameters: torch.optim.SGD(parameters, torch.inf))
    prune(pruned, 0.5)
    assert all(region.reverted for region in report.regions)
    assert_same_weights(model, pruned)


def test_errors_are_those_of_held_out_sequences():
    model, dense, calibration = lively("llama"), lively("llama"), batches_of("llama", 5)
    report = rebuild(model, calibration, region="block", holdout=0.4)
    expected = errors_by_definition(model, dense, calibration, "block", "SS", measured=slice(3, None))
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)


def test_held_out_sequences_are_not_trained_on():
    """Other tokens in their place give the same weights, since magnitude looks at no input."""
    calibration = batches_of("llama", 4)
    others = [*calibration[:3], {"input_ids": (calibration[3]["input_ids"] + 1) % 61}]
    models, options = (lively("llama"), lively("llama")), {"holdout": 0.25, "learning_rate": 1e-3}
    reports = [rebuild(model, c, **options) for model, c in zip(models, (calibration, others), strict=True)]
    assert not any(region.reverted for report in reports for region in report.regions)
    assert_same_weights(*models)
    assert reports[0].regions[0].error != reports[1].regions[0].error


@pytest.mark.parametrize(
    ("share", "batches", "held"), [(0, 5, 0), (0.1, 5, 1), (0.1, 1, 0), (0.9, 3, 2), (0.14, 50, 7)]
)
def test_so_many_batches_areheld_out_batches(share, batches, held):
    assert held_out_batches(share, batches) == held


# -- the dense model -------------------------------------------------------------------------------------------------


def test_targets_come_from_the_dense_region_of_a_model_that_was_pruned_before():
    """By rows and columns, as structured pruning does: the same width, and nothing left of them."""
    dense, model, calibration = lively("llama"), lively("llama"), batches_of("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::3] = 0
            layer.mlp.gate_proj.weight[::3] = 0
            layer.mlp.down_proj.weight[:, ::3] = 0
            layer.self_attn.v_proj.weight[4:] = 0
    zeros = zeros_of(model)
    report = rebuild(model, calibration, pattern=None, dense=dense, region="block")
    assert all(0 < region.error < region.error_pruned for region in report.regions)
    expected = errors_by_definition(model, dense, calibration, "block", "SS")
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)
    assert_same_zeros(model, zeros)
    assert report.pruning is None
    assert_same_weights(dense, lively("llama"))


@pytest.mark.parametrize(("family", "mode"), [("llama", "SS"), ("phi", "SD"), ("t5", "SD"), ("t5", "DD")])
def test_a_model_pruned_before_is_fitted_as_one_pruned_on_the_way(family, mode):
    calibration, options = batches_of(family), {"region": "block", "mode": mode}
    one, other = lively(family), lively(family)
    expected = rebuild(one, calibration, **options)
    prune(other, 0.5)
    report = rebuild(other, calibration, pattern=None, dense=lively(family), **options)
    assert_same_weights(one, other)
    assert report.regions[-1].error == expected.regions[-1].error


@pytest.mark.parametrize("mode", ["SS", "DD"])
def test_a_dense_model_in_half_precision_teaches_as_well(mode):
    dense, model = lively("llama").bfloat16(), lively("llama").bfloat16()
    prune(model, 0.5)
    report = rebuild(model, batches_of("llama"), pattern=None, dense=dense, mode=mode)
    assert all(region.error < region.error_pruned for region in report.regions)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}


def test_zeros_of_weights_that_are_not_pruned_now_stay_too():
    model = lively("llama")
    prune(model, 0.5, target_modules=["q_proj", "up_proj"])
    zeros = zeros_of(model)
    rebuild(model, batches_of("llama"), exclude_modules=["q_proj", "up_proj"])
    assert_zeros_kept(model, zeros)


# -- pruning and reconstruction interleave ---------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
@pytest.mark.parametrize("region", ["submodule", "matrix"])
def test_every_criterion_prunes_on_the_way(criterion, region):
    calibration = batches_of("llama", 4, 4)
    report = rebuild(
        lively("llama"), calibration, pattern="2:4", criterion=criterion, region=region, activations="cpu"
    )
    assert report.pruning.criterion == criterion
    assert report.pruning.sparsity == 0.5
    assert len(report.pruning.weights) == 21
    assert report.pruning.error > 0
    assert sum(r.error for r in report.regions) < sum(r.error_pruned for r in report.regions)


def test_the_first_region_is_scored_as_prune_would_and_later_ones_on_reconstructed_inputs():
    calibration, model, pruned = batches_of("llama"), lively("llama"), lively("llama")
    rebuild(model, calibration, criterion="wanda", region="block")
    prune(pruned, 0.5, criterion="wanda", calibration=calibration)
    found, alone = zeros_of(model), zeros_of(pruned)
    assert all(torch.equal(found[name], alone[name]) for name in found if ".0." in name)
    # Scores of the second block by hand, on what the finished first block makes.
    dense = lively("llama")
    dense.model.layers[0] = model.model.layers[0]
    name = "model.layers.1.self_attn.q_proj"
    scores = weight_of(dense, name).abs() * inputs_by_hooks(dense, calibration)[name].double().norm(dim=0)
    assert torch.equal(found[name], scores < scores.sort(dim=1).values[:, 8:9])
    assert not torch.equal(found[name], alone[name])


@pytest.mark.parametrize(("family", "activations"), [("phi", "disk"), ("t5", "disk"), ("t5", "cpu")])
def test_where_activations_wait_changes_nothing(family, activations, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    calibration, one, other = batches_of(family), lively(family), lively(family)
    region = "submodule" if family == "phi" else "block"
    rebuild(one, calibration, mode="SD", region=region)
    rebuild(other, calibration, mode="SD", region=region, activations=activations)
    assert_same_weights(one, other)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_layers_with_patterns_of_their_own():
    model = lively("llama")
    report = rebuild(model, batches_of("llama"), pattern={"q_proj": "2:4", r"model\.layers\.1\.mlp\..*": 0.75})
    zeros = {name: float(zero.float().mean()) for name, zero in zeros_of(model).items()}
    for name, share in zeros.items():
        assert share == (0.5 if "q_proj" in name else 0.75 if "1.mlp" in name else 0)
    untrained = [region.name for region in report.regions if region.steps == 0]
    assert untrained == ["model.layers.0 (mlp)", "model.layers.2 (mlp)"]


def test_gradients_may_be_off_around_it():
    with torch.no_grad():
        report = rebuild(lively("llama"), batches_of("llama"))
    assert all(region.error < region.error_pruned for region in report.regions)


def test_the_random_generator_of_the_caller_is_left_alone():
    model, calibration, state = lively("llama"), batches_of("llama"), torch.get_rng_state()
    rebuild(model, calibration, criterion="random", tuner=MaskLoRAConfig(r=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_what_is_drawn():
    calibration = batches_of("llama")

    def rebuilt(seed):
        model = lively("llama")
        torch.rand(3)
        rebuild(model, calibration, criterion="random", tuner=MaskLoRAConfig(r=2, lora_dropout=0.1), seed=seed)
        return model

    one, again, other = rebuilt(0), rebuilt(0), rebuilt(1)
    assert_same_weights(one, again)
    assert all(not torch.equal(zeros, zeros_of(other)[name]) for name, zeros in zeros_of(one).items())


def test_the_report_can_be_read():
    report = rebuild(lively("llama"), batches_of("llama"), criterion="wanda")
    said = json.loads(json.dumps(report.to_dict()))
    assert [region["name"] for region in said["regions"]][:2] == ["model.layers.0 (attention)", "model.layers.0 (mlp)"]
    assert said["pruning"]["sparsity"] == 0.5
    assert (said["region"], said["mode"], said["loss"], said["tuner"]) == ("submodule", "SS", "mse", "full")
    assert said["seconds"] > 0
    assert said["peak_memory"] > 0
    assert re.fullmatch(
        r"reconstructed 6 regions \(submodule, SS, full\) in .* s: mean .* -> .*, 0 reverted", str(report)
    )
    adapters = rebuild(lively("llama"), batches_of("llama"), tuner=MaskLoRAConfig(r=2), max_steps=1)
    assert adapters.tuner == "MASK_LORA"


# -- killed and resumed ----------------------------------------------------------------------------------------------


LORA = MaskLoRAConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
# Family, options, and where the run is killed: after so many regions and one more, or at a step of the one after them.
KILLED = {
    "between two regions": ("llama", {"criterion": "random"}, (2, None)),
    "within a region": ("llama", {"mode": "SD", "gradient_accumulation_steps": 2}, (3, 2)),
    "within the first region": ("llama", {}, (0, 1)),
    "with adapters": ("llama", {"tuner": LORA, "mode": "DD"}, (2, 1)),
    "single matrices": ("llama", {"region": "matrix", "criterion": "wanda"}, (2, None)),
    "in the second stack": ("t5", {"region": "block", "mode": "SD"}, (2, 3)),
}


def calibration_of(family):
    torch.manual_seed(0)
    return batches_of(family)


def run_until_killed(folder, scenario):
    """Run a scenario of `KILLED` in this process, which does not survive it."""
    family, options, (last, step) = KILLED[scenario]
    finished = []

    def after_region(report):
        finished.append(report.name)
        if step is None and len(finished) > last:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(told):
        if len(finished) == last and told.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    model = lively(family)
    rebuild(model, calibration_of(family), state_dir=folder, on_region=after_region, on_step=after_step, **options)


def run_all_until_killed(folder):
    """Run every scenario in a process of its own; nothing is imported twice."""
    for scenario in KILLED:
        child = os.fork()
        if child == 0:
            run_until_killed(Path(folder) / scenario, scenario)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{scenario!r} was not killed"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders that killed runs left, with strings hashed otherwise than here."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-c", f"{importing(__file__)}; tests.run_all_until_killed({str(folder)!r})"],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    return folder


@pytest.mark.parametrize("scenario", KILLED)
def test_a_killed_run_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(killed, scenario):
    family, options, (last, step) = KILLED[scenario]
    whole, model, told, seen = lively(family), lively(family), [], []
    expected = rebuild(whole, calibration_of(family), **options)
    done = last if step is not None else last + 1
    matrices = options.get("region") == "matrix"
    assert len(list((killed / scenario).glob("*.safetensors"))) == (1 if matrices else done)
    report = rebuild(
        model,
        calibration_of(family),
        state_dir=killed / scenario,
        on_step=told.append,
        on_region=seen.append,
        **options,
    )
    assert_same_weights(model, whole)
    names = [region.name for region in expected.regions]
    assert list(dict.fromkeys(step.region for step in told)) == ([] if matrices else names[done:])
    assert [replace(region, seconds=0) for region in report.regions] == [
        replace(region, seconds=0) for region in expected.regions
    ]
    # Those that an earlier run finished are told of too, so that a log is whole.
    assert tuple(seen) == report.regions
    assert report.pruning.weights == expected.pruning.weights

    again = lively(family)
    rebuild(again, calibration_of(family), state_dir=killed / scenario, on_step=pytest.fail, **options)
    assert_same_weights(again, whole)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    rebuild(lively("llama"), calibration_of("llama"), state_dir=folder)
    return folder


def other_tokens():
    return [{"input_ids": (batch["input_ids"] + 1) % 61} for batch in calibration_of("llama")]


def warmed_up(optimizer, steps):
    return get_linear_schedule_with_warmup(optimizer, steps, steps)


@pytest.mark.parametrize(
    "changed",
    [
        {"pattern": 0.6},
        {"pattern": {"q_proj": 0.5}},
        {"criterion": "wanda"},
        {"group": "row"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"region": "block"},
        {"mode": "DD"},
        {"loss": "cosine"},
        {"tuner": MaskLoRAConfig(r=2)},
        {"learning_rate": 1e-3},
        {"epochs": 2},
        {"max_steps": 5},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1.0},
        {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-2)},
        {"scheduler": warmed_up},
        {"autocast": torch.bfloat16},
        {"holdout": 0.3},
        {"seed": 1},
    ],
    ids=named,
)
def test_a_run_with_other_arguments_is_not_resumed(state, changed):
    with pytest.raises(ValueError, match="state of a run with another arguments. Resume with the same"):
        rebuild(lively("llama"), calibration_of("llama"), state_dir=state, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, {"optimizer": torch.optim.SGD}),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
            {"optimizer": functools.partial(torch.optim.SGD, lr=1)},
        ),
        ({"tuner": LORA}, {"tuner": MaskLoRAConfig(r=2, target_modules=["q_proj"])}),
    ],
)
def test_choices_are_told_apart_by_what_is_in_them(tmp_path, changed):
    first, second = changed
    rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **first)
    rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **first)
    with pytest.raises(ValueError, match="another arguments"):
        rebuild(lively("llama"), calibration_of("llama"), state_dir=tmp_path, max_steps=0, **second)


def test_a_run_on_other_data_or_another_model_is_not_resumed(state, tmp_path):
    with pytest.raises(ValueError, match="another data. Resume"):
        rebuild(lively("llama"), other_tokens(), state_dir=state)
    with pytest.raises(ValueError, match="another data. Resume"):
        rebuild(lively("llama"), calibration_of("llama")[:2], state_dir=state)
    with pytest.raises(ValueError, match="another model. Resume"):
        rebuild(tiny("llama"), calibration_of("llama"), state_dir=state)
    with pytest.raises(ValueError, match="another model, data, arguments. Resume"):
        rebuild(tiny("opt"), other_tokens(), state_dir=state)
    options = {"state_dir": tmp_path, "pattern": None, "max_steps": 0}
    rebuild(lively("llama"), calibration_of("llama"), dense=lively("llama"), **options)
    with pytest.raises(ValueError, match="another dense model. Resume"):
        rebuild(lively("llama"), calibration_of("llama"), dense=tiny("llama"), **options)


# -- several processes -----------------------------------------------------------------------------------------------


SHARED = {"tuner": LORA, "mode": "DD", "criterion": "wanda"}


def run_as_one_of_many(folder):
    """Reconstruct as one process of those that torchrun started, and save what came of it."""
    state, model = PartialState(cpu=True), lively("llama")
    told = []
    report = rebuild(
        model, calibration_of("llama"), state_dir=Path(folder) / "state", on_region=told.append, **SHARED
    )  # fmt: skip
    said = {"weights": model.state_dict(), "regions": report.regions, "pruning": report.pruning.weights}
    said["told"] = [region.name for region in told]
    torch.save(said, Path(folder) / f"{state.process_index}.pt")


@pytest.mark.slow
def test_processes_share_out_the_regions_of_mode_dd(tmp_path):
    in_two_processes(tmp_path, __file__, f"run_as_one_of_many({str(tmp_path)!r})")
    model, told = lively("llama"), []
    report = rebuild(model, calibration_of("llama"), on_step=told.append, **SHARED)
    for process in range(2):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=False)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(found["weights"][name] == 0, value == 0)
        names = [region.name for region in report.regions]
        assert [region.name for region in found["regions"]] == names
        assert sorted(found["told"]) == sorted(names)
        errors = [(region.error_pruned, region.error) for region in found["regions"]]
        assert sum(errors, ()) == pytest.approx(sum(((r.error_pruned, r.error) for r in report.regions), ()), rel=1e-4)
        assert [weight.name for weight in found["pruning"]] == [weight.name for weight in report.pruning.weights]


# -- errors ----------------------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


@pytest.mark.parametrize("tuner", ["full", "PERP"])
def test_an_error_midway_names_the_block_and_leaves_plain_modules(tuner):
    def fail(step):
        if step.region == "model.decoder.layers.1 (mlp)" and step.number == 3:
            raise OwnError("the caller's own words")

    model, whole, pruned = lively("opt").train(), lively("opt"), lively("opt")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    calibration = batches_of("opt")
    with pytest.raises(OwnError, match="the caller's own words") as caught:
        rebuild(model, calibration, tuner=TUNERS[tuner], on_step=fail)
    assert caught.value.__notes__ == ["While reconstructing 'model.decoder.layers.1': the blocks before are finished."]
    assert str(model) == str(whole)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    # What is finished is finished, the region in turn is as pruning left it, and the rest is dense.
    rebuild(whole, calibration, tuner=TUNERS[tuner])
    prune(pruned, 0.5)
    dense = lively("opt")
    for name, found in model.named_parameters():
        if ".layers.0." in name or ".layers.1.self_attn" in name:
            expected = whole
        else:
            expected = pruned if ".layers.1.fc" in name else dense
        assert torch.equal(found, expected.get_parameter(name)), name


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_error_of_the_model_is_reported_as_itself(block):
    model = lively("llama")

    def fail(*args, **kwargs):
        raise OwnError("the model's own words")

    model.model.layers[block].mlp.forward = fail
    with pytest.raises(OwnError, match="the model's own words") as caught:
        rebuild(model, batches_of("llama"))
    assert getattr(caught.value, "__notes__", []) == (
        [f"While reconstructing 'model.layers.{block}': the blocks before are finished."] if block else []
    )
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_a_layer_that_saw_no_token_is_refused():
    model = lively("llama")
    model.model.layers[1].mlp.idle = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'model.layers.1.mlp.idle' saw no calibration token"):
        rebuild(model, batches_of("llama"))


def nearly_llama():
    model = lively("llama")
    del model.model.layers[2]
    return model


def adapted():
    return get_peft_model(lively("llama"), MaskLoRAConfig(r=2, target_modules=["q_proj"]))


def itself():
    model = lively("llama")
    return reconstruct(model, TOKENS, dense=model)


TOKENS = torch.arange(24).view(2, 12)


def refused(**options):
    return lambda: reconstruct(lively("llama"), TOKENS, **{"pattern": 0.5} | options)


REFUSALS = [
    (
        refused(region="layer"),
        ValueError,
        "`region` must be \"matrix\", .* or a number of blocks from 1 on, got 'layer'",
    ),
    (refused(region=0), ValueError, "a number of blocks from 1 on, got 0"),
    (refused(region=1.5), ValueError, "a number of blocks from 1 on, got 1.5"),
    (refused(mode="DS"), ValueError, "`mode` must be one of 'DD', 'SS', 'SD', got 'DS'"),
    (refused(loss="ce"), ValueError, "`loss` must be one of 'mse', 'relative_mse', 'cosine', got 'ce'"),
    (refused(pattern=None), ValueError, "Expected either `pattern`, .* or `dense`, .*; got neither"),
    (refused(dense=tiny("llama")), ValueError, "Expected either `pattern`, .* or `dense`, .*; got both"),
    (
        refused(region="matrix", mode="SD"),
        ValueError,
        'Single matrices are solved exactly .* Use `region="submodule"`',
    ),
    (refused(region="matrix", loss="cosine"), ValueError, "Single matrices are solved exactly"),
    (refused(region="matrix", tuner=MaskLoRAConfig()), ValueError, "Single matrices are solved exactly"),
    (refused(region="matrix", pattern=None, dense=tiny("llama")), ValueError, "Single matrices are solved exactly"),
    (refused(tuner="lora"), TypeError, "`tuner` must be \"full\" or the configuration of a PEFT tuner .* got 'lora'"),
    (refused(tuner=PromptTuningConfig()), TypeError, '`tuner` must be "full" or .* got PromptTuningConfig'),
    (
        refused(tuner=MaskLoRAConfig(train_head="full")),
        ValueError,
        "`train_head='full'` reaches beyond what a region holds. Leave it out .* `train_norms` and `bias` work",
    ),
    (
        refused(tuner=MaskLoRAConfig(modules_to_save=["lm_head"])),
        ValueError,
        r"`modules_to_save=\['lm_head'\]` reaches",
    ),
    (
        refused(tuner=MaskLoRAConfig(target_parameters=["w"])),
        ValueError,
        r"`target_parameters=\['w'\]` reaches beyond",
    ),
    (
        refused(tuner=MaskLoRAConfig(target_modules=["lm_head"])),
        ValueError,
        "`target_modules={'lm_head'}` of the tuner matches none .* such as 'model.layers.0.self_attn.q_proj'",
    ),
    (refused(holdout=1), ValueError, r"`holdout` must be in \[0, 1\), got 1"),
    (refused(holdout=-0.1), ValueError, r"`holdout` must be in \[0, 1\), got -0.1"),
    (refused(epochs=0), ValueError, "`epochs` must be above 0, got 0"),
    (refused(max_steps=-1), ValueError, "`max_steps` must be None or at least 0, got -1"),
    (refused(batch_size=0), ValueError, "`batch_size` must be at least 1, got 0"),
    (refused(gradient_accumulation_steps=0), ValueError, "`gradient_accumulation_steps` must be at least 1, got 0"),
    (refused(group="model"), ValueError, '`group="model"` compares the weights of all regions at once.* Use `prune`'),
    (
        lambda: reconstruct(adapted(), TOKENS, pattern=0.5),
        ValueError,
        "Layer '.*q_proj' has adapters; reconstruction .* Merge or unload them first, .* as `tuner`",
    ),
    (itself, ValueError, "Expected `dense` as the model before it was pruned, got the pruned model itself"),
    (
        refused(pattern=None, dense=nearly_llama()),
        ValueError,
        "Expected `dense` .* got one with other blocks. Load it",
    ),
    (refused(activations="gpu"), ValueError, "`activations` must be one of 'device', 'cpu', 'disk', got 'gpu'"),
    (refused(criterion="wand"), ValueError, "Unknown criterion 'wand'"),
    (refused(target_modules=["lm_head"]), ValueError, "'lm_head' lies outside the blocks"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_a_refusal_says_what_to_do_before_anything_is_changed(refused, error, words):
    with pytest.raises(error, match=words):
        refused()


def test_a_refused_model_is_untouched():
    model = lively("bart")
    with pytest.raises(ValueError, match='Use `region="block"`'):
        rebuild(model, batches_of("bart"))
    assert_same_weights(model, lively("bart"))
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- from disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"region": 2, "mode": "DD"}, {"region": "matrix", "criterion": "wanda"}])
def test_a_checkpoint_is_reconstructed_as_the_loaded_model_would_be(tmp_path, options):
    lively("llama").save_pretrained(tmp_path / "dense")
    calibration, model = batches_of("llama"), lively("llama")
    options = {"pattern": 0.5, "learning_rate": 5e-3, "max_steps": 3, "holdout": 0} | options
    expected = reconstruct(model, calibration, **options)
    report = reconstruct_checkpoint(tmp_path / "dense", tmp_path / "sparse", calibration, **options)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), model)
    assert [region.error for region in report.regions] == [region.error for region in expected.regions]
    assert report.pruning.sparsity == 0.5


def test_a_checkpoint_that_was_interrupted_is_resumed_into_a_new_folder(tmp_path):
    def interrupt(report):
        if report.name == "model.layers.1 (attention)":
            raise OwnError

    lively("llama").save_pretrained(tmp_path / "dense")
    model, told, calibration = lively("llama"), [], batches_of("llama")
    options = {"pattern": 0.5, "max_steps": 3, "state_dir": tmp_path / "state"}
    reconstruct(model, calibration, **options | {"state_dir": None})
    with pytest.raises(OwnError):
        reconstruct_checkpoint(tmp_path / "dense", tmp_path / "one", calibration, on_region=interrupt, **options)
    reconstruct_checkpoint(tmp_path / "dense", tmp_path / "other", calibration, on_step=told.append, **options)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), model)
    assert told[0].region == "model.layers.1 (mlp)"
    # The weights of a block are seen for the first time when its turn comes.
    with torch.no_grad():
        model = lively("llama")
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "edited")
    with pytest.raises(ValueError, match=r"state' holds the state of a run with another model\. Resume with the same"):
        reconstruct_checkpoint(tmp_path / "edited", tmp_path / "third", calibration, **options)


class Bar:
    """A progress bar that is shown."""

    disable = False

    def __init__(self):
        self.shown = []

    def set_postfix(self, **values):
        self.shown.append(values)


def test_the_progress_bar_tells_region_and_loss_and_seldom_asks_the_device():
    bar, told = Bar(), []
    on_step = showing_loss(bar, told.append)
    steps = [Step("layers.0", number, 3, torch.tensor(0.12345), 1e-3) for number in (1, 2, 3)]
    for step in steps:
        on_step(step)
    assert bar.shown == [{"region": "layers.0", "loss": "0.123"}]
    assert told == steps


def test_no_progress_bar_no_reading_of_losses():
    bar = Bar()
    bar.disable = True
    assert showing_loss(bar, None) is None

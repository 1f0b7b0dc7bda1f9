"""Reconstruction against its definition, computed on the finished model; and what it must leave alone."""

import copy
import gc
import json
import re
import tempfile

import pytest
import torch
from peft import PromptTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from peft_sparse import OWL, LeastSquares, MaskLoRAConfig, Swap, prune, reconstruct, sparsity
from peft_sparse.model.blocks import find_blocks
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.tuners.model import SparseLoraModel

from checks import assert_same_weights, assert_same_zeros, assert_zeros_kept, inputs_by_hooks, named, zeros_of
from conftest import FAMILIES, SIZES, VOCABULARY, tiny
from rebuilding import (
    TUNERS,
    OwnError,
    Told,
    assert_close_weights,
    batches_of,
    errors_by_definition,
    lively,
    rebuild,
    split,
    weight_of,
)


def check(family, size, mode, calibration, **options):
    model, dense, pruned = lively(family), lively(family), lively(family)
    report = rebuild(model, calibration, region=size, mode=mode, **options)
    prune(pruned, 0.5)
    assert_same_zeros(model, zeros_of(pruned))
    expected = errors_by_definition(model, dense, calibration, size, mode)
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)
    assert all(region.error < region.error_pruned for region in report.regions)
    assert not any(region.reverted for region in report.regions)


@pytest.mark.parametrize(
    ("family", "size", "mode"),
    [
        *((family, "block", "SS") for family in FAMILIES),
        *((family, "block", mode) for family in ("gemma3", "phi", "mixtral", "t5", "bart") for mode in ("SD", "DD")),
        *((family, "submodule", "SS") for family in ("llama", "opt", "gemma3", "phi", "mixtral", "gpt_oss", "vit")),
        *(("gpt2", "submodule", mode) for mode in ("SD", "DD")),
        *(("gpt_neox", "submodule", mode) for mode in ("SS", "SD", "DD")),
        ("gpt2", 2, "SS"),
        ("t5", 2, "SD"),
        ("bart", 2, "DD"),
    ],
)
def test_regions_get_better_by_what_the_report_says(family, size, mode):
    check(family, size, mode, batches_of(family))


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


ATTENTION = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
]


def test_what_lies_outside_the_region_stays():
    model, before = lively("llama"), lively("llama")
    rebuild(model, batches_of("llama"), target_modules=r".*\.1\.self_attn\.[qkvo]_proj")
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    changed = {name for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed == {f"model.layers.1.{name}" for name in ATTENTION}


def test_errors_are_those_of_held_out_sequences():
    model, dense, calibration = lively("llama"), lively("llama"), batches_of("llama", 5)
    report = rebuild(model, calibration, region="block", holdout=0.4)
    expected = errors_by_definition(model, dense, calibration, "block", "SS", measured=slice(3, None))
    assert [region.error for region in report.regions] == pytest.approx(expected, rel=1e-3)


# -- the dense model --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ({"criterion": "wanda"}, {"pattern": 0.5}),
        ({}, {"pattern": 0.3}),
        ({"pattern": "2:4"}, {"pattern": 0.5, "region": "matrix"}),
        ({"criterion": "wanda", "allocation": "owl"}, {"criterion": "wanda", "allocation": "owl"}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "mode": "DD"}),
    ],
    ids=named,
)
def test_a_model_that_was_pruned_already_is_no_teacher_of_itself(before, options):
    model, calibration = lively("llama"), batches_of("llama")
    prune(model, **{"pattern": 0.5, "calibration": calibration} | before)
    given = copy.deepcopy(model)
    with pytest.raises(ValueError, match="The targets of a reconstruction come from the dense model. .* zero already"):
        rebuild(model, calibration, **options)
    assert_same_weights(model, given)


def test_a_model_that_is_pruned_further_is_its_own_teacher_and_this_is_told():
    model = lively("llama")
    prune(model, 0.25)
    with pytest.warns(UserWarning, match="25.0% are zero already. To fit to a dense model, prune first"):
        report = rebuild(model, batches_of("llama"))
    assert all(region.error < region.error_pruned for region in report.regions)


def test_a_few_zeros_by_chance_do_not_count():
    model = lively("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, :2] = 0
    rebuild(model, batches_of("llama"), pattern=0.0)


# -- pruning and reconstruction interleave ----------------------------------------------------------------------------


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


BESIDE = {
    "owl": {"allocation": "owl"},
    "erk": {"allocation": "erk"},
    "given": {"allocation": {"q_proj": 0.25, "k_proj": 0.75, "v_proj": 0.75, "o_proj": 0.5, "mlp.*": 0.5}},
    "dsnot": {"refinement": "dsnot"},
    "swap": {"refinement": Swap(max_swaps=3)},
    "update": {"update": True},
    "all": {"allocation": OWL(spread=0.2), "refinement": "swap", "update": LeastSquares(damping=0.1)},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_without_steps_it_prunes_as_prune_does(beside):
    """Allocation, refinement and update included: the same weights, errors and totals."""
    calibration, options = batches_of("llama"), {"criterion": "wanda"} | BESIDE[beside]
    model, pruned = lively("llama"), lively("llama")
    report = rebuild(model, calibration, region="block", max_steps=0, **options)
    expected = prune(pruned, 0.5, calibration, **options)
    assert_close_weights(model, pruned)
    assert_same_zeros(model, zeros_of(pruned))
    assert [weight.sparsity for weight in report.pruning.weights] == [weight.sparsity for weight in expected.weights]
    assert report.pruning.error == pytest.approx(expected.error, rel=1e-3)
    if expected.error_selected is not None:
        assert report.pruning.error_selected == pytest.approx(expected.error_selected, rel=1e-3)
    assert (report.pruning.allocation, report.pruning.refinement) == (expected.allocation, expected.refinement)


@pytest.mark.parametrize(
    ("beside", "region", "mode"),
    [
        ("owl", "submodule", "SS"),
        ("erk", "submodule", "SD"),
        ("dsnot", "matrix", "SS"),
        ("swap", 2, "DD"),
        ("swap", "matrix", "DD"),
        ("all", "submodule", "SS"),
        ("all", "submodule", "SD"),
        ("all", 2, "DD"),
        ("all", "matrix", "SS"),
    ],
)
def test_what_is_beside_the_criterion_works_in_every_mode(beside, region, mode):
    """The total is exact, and the first matrices, whose inputs are those of `prune` in all modes, get its masks."""
    calibration, options = batches_of("llama"), {"criterion": "wanda"} | BESIDE[beside]
    model, pruned = lively("llama"), lively("llama")
    report = rebuild(model, calibration, region=region, mode=mode, max_steps=2, **options)
    prune(pruned, 0.5, calibration, **options)
    assert report.pruning.sparsity == sparsity(model) == sparsity(pruned) == 0.5
    found, expected = zeros_of(model), zeros_of(pruned)
    assert all(found[name].sum() == zeros.sum() for name, zeros in expected.items())
    first = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    assert all(torch.equal(found[name], expected[name]) for name in first)


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


def test_a_weight_that_is_also_the_embedding_is_pruned_only_if_asked():
    def tied():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=VOCABULARY))
        model.model.layers[1].mlp.up_proj.weight = model.model.embed_tokens.weight
        return model

    calibration, model = batches_of("llama"), tied()
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj' is also the embedding"):
        rebuild(tied(), calibration)
    rebuild(model, calibration, prune_tied=True)
    assert float((model.model.embed_tokens.weight == 0).float().mean()) == 0.5


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


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "PERP"])
def test_an_error_midway_names_the_block_and_leaves_plain_modules(tuner):
    def fail(step):
        if step.region == "model.decoder.layers.1 (mlp)" and step.number == 3:
            raise OwnError("the caller's own words")

    model, whole, pruned = lively("opt").train(), lively("opt"), lively("opt")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    calibration = batches_of("opt")
    with pytest.raises(OwnError, match="the caller's own words") as caught:
        rebuild(model, calibration, tuner=TUNERS[tuner], observer=Told(on_step=fail))
    assert caught.value.__notes__ == [
        "While reconstructing 'model.decoder.layers.1': the blocks before it are finished."
    ]
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
    # It is met before any work, so that there is nothing to say about finished blocks.
    assert not hasattr(caught.value, "__notes__")
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_a_layer_that_is_never_called_is_refused_before_any_work():
    model = lively("llama")
    model.model.layers[1].mlp.idle = torch.nn.Linear(4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.idle'.*`exclude_modules=\['idle'\]`"):
        rebuild(model, batches_of("llama"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def itself():
    model = lively("llama")
    return reconstruct(model, calibration=TOKENS, dense=model)


TOKENS = torch.arange(24).view(2, 12)


def refused(**options):
    return lambda: reconstruct(lively("llama"), calibration=TOKENS, **split({"pattern": 0.5} | options))


# Beside those of tests/test_refusals.py, which reach every `raise` once.
REFUSALS = [
    (refused(region=0), ValueError, "a number of blocks of at least 1, got 0"),
    (refused(region=1.5), ValueError, "a number of blocks of at least 1, got 1.5"),
    (refused(dense=tiny("llama")), ValueError, "Expected either `pattern` .* or `dense`, .*; got both"),
    (refused(pattern=None, sparsity=0.5, dense=tiny("llama")), ValueError, "Expected either .*; got both"),
    (refused(region="matrix", loss="cosine"), ValueError, "solves a least-squares problem for each matrix"),
    (refused(region="matrix", tuner=MaskLoRAConfig()), ValueError, "solves a least-squares problem"),
    (refused(tuner=PromptTuningConfig()), TypeError, '`tuner` must be "full" or .* got PromptTuningConfig'),
    (
        refused(tuner=MaskLoRAConfig(modules_to_save=["lm_head"])),
        ValueError,
        r"`modules_to_save=\['lm_head'\]` trains",
    ),
    (refused(tuner=MaskLoRAConfig(target_parameters=["w"])), ValueError, r"`target_parameters=\['w'\]` trains"),
    (refused(holdout=-0.1), ValueError, r"`holdout` must be in \[0, 1\), got -0.1"),
    (refused(epochs=0), ValueError, "`epochs` must be above 0, got 0"),
    (refused(max_steps=-1), ValueError, "`max_steps` must be None or at least 0, got -1"),
    (refused(gradient_accumulation_steps=0), ValueError, "`gradient_accumulation_steps` must be at least 1, got 0"),
    (itself, ValueError, "Expected `dense` to be the model before it was pruned, got the pruned model itself"),
    (refused(criterion="wand"), ValueError, "'wand'"),
    (refused(target_modules=["lm_head"]), ValueError, "'lm_head' lies outside the blocks"),
    (refused(pattern={"q_proj": 0.5}, allocation="erk"), ValueError, "`pattern` is a dict"),
    (refused(criterion="sparsegpt", refinement="swap"), ValueError, "'sparsegpt'"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_a_refusal_says_what_to_do_before_anything_is_changed(refused, error, words):
    with pytest.raises(error, match=words):
        refused()


# -- blocks that are fitted whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SS", "SD", "DD"])
def test_blocks_that_cannot_be_divided_are_fitted_whole_and_counted(mode):
    model, other = lively("bart"), lively("bart")
    report = rebuild(model, batches_of("bart"), mode=mode)
    expected = rebuild(other, batches_of("bart"), mode=mode, region="block", max_steps=0)
    assert [region.name for region in report.regions] == [region.name for region in expected.regions]
    assert all("computes something else" in region.whole for region in report.regions)
    assert all(region.error < region.error_pruned for region in report.regions)
    assert str(report).endswith("0 reverted, 4 blocks fitted whole")
    assert [region["whole"] for region in report.to_dict()["regions"]] == [r.whole for r in report.regions]
    assert {region.whole for region in expected.regions} == {None}


def test_a_block_that_is_fitted_whole_does_not_change_the_seeds_of_others():
    """Its parts have one number each, whether it is divided or not."""

    def rebuilt(post_norm):
        model = lively("llama")
        if post_norm:
            norm, block = torch.nn.LayerNorm(16), model.model.layers[0]
            forward = block.forward
            block.forward = lambda hidden, **kwargs: norm(forward(hidden, **kwargs))
        options = {"criterion": "random", "max_steps": 0}
        return rebuild(model, batches_of("llama"), **options), zeros_of(model)

    (report, plain), (of_whole, zeros) = rebuilt(False), rebuilt(True)
    assert [region.whole is not None for region in report.regions] == [False] * 6
    assert [region.whole is not None for region in of_whole.regions] == [True] + [False] * 4
    for name, expected in plain.items():
        assert torch.equal(zeros[name], expected) == (".layers.0.mlp" not in name), name


def test_a_student_and_a_teacher_of_which_only_one_can_be_divided_are_both_whole():
    dense, model = lively("llama"), lively("llama")
    norm = torch.nn.LayerNorm(16)
    forward = dense.model.layers[1].forward
    dense.model.layers[1].forward = lambda hidden, **kwargs: norm(forward(hidden, **kwargs))
    prune(model, 0.5)
    report = rebuild(model, batches_of("llama"), pattern=None, dense=dense)
    assert [region.name for region in report.regions][2:4] == ["model.layers.1", "model.layers.2 (attention)"]
    assert "computes something else" in report.regions[2].whole


# -- what it leaves as it was -----------------------------------------------------------------------------------------


def interrupt(step):
    if step.region.startswith("model.layers.1"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("tuner", ["full", "MaskLoRA", "PERP"])
@pytest.mark.parametrize("ending", [None, interrupt])
def test_gradients_that_lie_around_do_not_enter_and_stay(tuner, ending):
    calibration, clean, model = batches_of("llama"), lively("llama").bfloat16(), lively("llama").bfloat16().train()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 100.0) if number % 3 else None
        parameter.requires_grad_(number % 2 == 0)
    before = [(p, p.grad, p.requires_grad, p.dtype) for p in model.parameters()]
    tree = str(model)
    options = {"tuner": TUNERS[tuner], "observer": Told(on_step=ending), "max_grad_norm": 1.0}
    if ending is None:
        rebuild(model, calibration, **options)
        rebuild(clean, calibration, **options)
        assert_same_weights(model, clean)
    else:
        with pytest.raises(KeyboardInterrupt):
            rebuild(model, calibration, **options)
    after = [(p, p.grad, p.requires_grad, p.dtype) for p in model.parameters()]
    assert all(
        one[0] is other[0] and one[1] is other[1] and one[2:] == other[2:]
        for one, other in zip(before, after, strict=True)
    )
    assert all((p.grad == 100).all() for p in model.parameters() if p.grad is not None)
    assert str(model) == tree
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ or hasattr(module, "peft_config") for module in model.model.layers)


@pytest.mark.parametrize("layer", [3, 6])
def test_adapters_that_were_attached_or_merged_in_part_are_taken_off(layer, monkeypatch):
    """An interrupt may come at the third of four layers that get an adapter, or at the second that loses it."""
    model, dense, calls = lively("llama"), lively("llama"), []
    replace_module = SparseLoraModel._replace_module

    def interrupted(*args):
        calls.append(args)
        if len(calls) == layer:
            raise KeyboardInterrupt
        replace_module(*args)

    monkeypatch.setattr(SparseLoraModel, "_replace_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rebuild(model, batches_of("llama"), tuner=MaskLoRAConfig(r=2))
    assert str(model) == str(dense)
    assert not any(hasattr(module, "peft_config") for module in model.modules())


@pytest.mark.parametrize("tuner", ["full", "MaskLoRA"])
def test_a_default_device_of_the_caller_changes_nothing(tuner):
    """As `cuda` and `meta` are for a user who loads models so."""
    calibration, one, other = batches_of("llama"), lively("llama"), lively("llama")
    rebuild(one, calibration, tuner=TUNERS[tuner], holdout=0.4)
    with torch.device("meta"):
        rebuild(other, calibration, tuner=TUNERS[tuner], holdout=0.4)
    assert_same_weights(one, other)


# -- weights that stand in several places -----------------------------------------------------------------------------


def tied(kind):
    model = lively("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    if kind == "weight":
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    elif kind == "memory":
        second.mlp.up_proj.weight.data = first.mlp.up_proj.weight.data
    elif kind == "norm":
        second.input_layernorm = first.input_layernorm
    elif kind == "block":
        model.model.layers[1] = first
    elif kind == "outside":
        model.model.norm.weight = second.input_layernorm.weight
    return model


@pytest.mark.parametrize("kind", ["weight", "memory", "norm", "block", "outside"])
@pytest.mark.parametrize("mode", ["SS", "DD"])
def test_weights_of_two_regions_are_refused_before_any_work(kind, mode):
    model, expected, told = tied(kind), tied(kind), Told()
    with pytest.raises(ValueError, match="are one weight, but they .* belong to different regions, or one of them"):
        rebuild(model, batches_of("llama"), mode=mode, observer=told)
    assert_same_weights(model, expected)
    assert not told.promised


def test_weights_that_stay_may_stand_in_two_regions():
    """A norm that is not trained, and a matrix that is neither pruned nor adapted."""
    rebuild(tied("norm"), batches_of("llama"), tuner=MaskLoRAConfig(r=2), max_steps=1)
    rebuild(tied("norm"), batches_of("llama"), region="matrix")
    options = {"tuner": MaskLoRAConfig(r=2), "exclude_modules": ["up_proj"], "max_steps": 1}
    rebuild(tied("weight"), batches_of("llama"), **options)


def test_blocks_of_one_region_may_share_a_weight():
    model, seen = tied("weight"), []

    def optimizer(parameters):
        seen.append(len(parameters) - len(set(parameters)))
        return torch.optim.AdamW(parameters, 5e-3)

    report = rebuild(model, batches_of("llama"), region=3, optimizer=optimizer)
    assert seen == [0]
    assert report.regions[0].error < report.regions[0].error_pruned
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight

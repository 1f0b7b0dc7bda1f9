"""prune_structured on real models: what is zero, what the ratio counts, and what compensation restores."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from peft_sparse import MaskLoRAConfig, compact, prune_structured, reconstruct, sparsity
from peft_sparse.reconstruction import Fit
from peft_sparse.structured.metrics import METRICS
from peft_sparse.structured.units import find_units

from checks import assert_same_weights, inputs_by_hooks, zeros_of
from conftest import SIZES, inputs_of, tiny


SUPPORTED = ("llama", "opt", "qwen3", "gemma3", "mistral", "qwen2", "gemma2", "phi")
STRUCTURES = ("al-am", "al-mm", "ul-mm", "ul-um")


def with_biases(family):
    """A tiny model whose biases, where it has any, are no zeros."""
    model = tiny(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def grouped(kv_heads, heads=6, **options):
    config = SIZES | {"hidden_size": 24, "num_attention_heads": heads, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**config, intermediate_size=24, num_key_value_heads=kv_heads, head_dim=4, **options)
    ).eval()


@pytest.fixture(params=SUPPORTED)
def supported(request):
    return with_biases(request.param)


@pytest.mark.parametrize(
    ("family", "structure"),
    [(family, "al-am") for family in SUPPORTED] + [("llama", other) for other in STRUCTURES[1:]],
)
def test_whole_units_are_zero_and_nothing_else(family, structure, tokens):
    model = with_biases(family)
    dense = copy.deepcopy(model)
    report = prune_structured(model, 0.3, structure=structure, calibration=tokens)
    assert report.removed >= 0.3
    for units, before, layer in zip(find_units(model), find_units(dense), report.layers, strict=True):
        gone = (units.output.weight == 0).all(0).view(units.count, -1).all(1)
        assert int((~gone).sum()) == layer.kept >= 1
        assert torch.equal(
            units.output.weight[:, units.columns_of(~gone)], before.output.weight[:, units.columns_of(~gone)]
        )
        for projection, original in zip(units.layers, before.layers, strict=True):
            rows = units.rows_of(projection, ~gone)
            assert not projection.weight[~rows].any()
            assert torch.equal(projection.weight[rows], original.weight[rows])
            if original.bias is not None:
                assert not projection.bias[~rows].any()
                assert torch.equal(projection.bias[rows], original.bias[rows])


def test_what_the_report_counts_is_what_is_zero(llama, tokens):
    report = prune_structured(llama, 0.4, calibration=tokens, compensate=False)
    cheapest = min(layer.cost for layer in report.layers if layer.kept < layer.units)
    assert 0.4 <= report.removed < 0.4 + cheapest / report.parameters_prunable
    zeros = sum(int(mask.sum()) for mask in zeros_of(llama).values())
    assert report.parameters_removed == zeros
    assert report.parameters_prunable == sum(mask.numel() for mask in zeros_of(llama).values())
    assert sparsity(llama) == report.removed == report.to_dict()["removed"]
    assert report.parameters_added == 0
    assert "(ratio 0.4, wifv, al-am)" in str(report)


def test_biases_count_as_parameters_of_their_units():
    units = find_units(tiny("opt"))
    # Three projections of 4 rows of 16 and a bias, 4 columns of 16; one row of 16 and a bias, one column of 16.
    assert [(part.count, part.cost) for part in units[:2]] == [(4, 3 * 4 * 17 + 4 * 16), (24, 17 + 16)]


@pytest.mark.parametrize("metric", METRICS)
def test_the_lowest_scores_of_a_layer_go(llama, tokens, metric):
    inputs = inputs_by_hooks(llama, [{"input_ids": tokens}])
    expected = {}
    for units in find_units(llama):
        x, weight = inputs[units.output_name].double(), units.output.weight.double()
        scores = {
            "ifv": x.var(0, unbiased=False),
            "wifv": x.var(0, unbiased=False) * weight.square().sum(0),
            "wifn": x.norm(dim=0) * weight.abs().mean(0),
            "wanda_sp": x.norm(dim=0) * weight.abs().mean(0),
            "magnitude_sp": weight.norm(dim=0),
        }[metric]
        if units.kind == "attention" and metric in ("ifv", "wifv", "wifn"):
            scores = scores.square()
        lowest = scores.view(units.count, -1).sum(1).argsort()[: units.count // 2]
        expected[units.name] = sorted(lowest.tolist())
    prune_structured(llama, 0.5, metric=metric, structure="ul-um", calibration=tokens)
    for units in find_units(llama):
        gone = (units.output.weight == 0).all(0).view(units.count, -1).all(1)
        assert gone.nonzero().squeeze(1).tolist() == expected[units.name]


def test_batches_and_padding_change_nothing(tokens):
    padded = torch.nn.functional.pad(tokens, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    variants = [
        {"calibration": tokens, "batch_size": 1},
        {"calibration": tokens, "batch_size": 6, "activations": "disk"},
        {"calibration": [{"input_ids": padded, "attention_mask": mask}]},
    ]
    models = [tiny("llama") for _ in variants]
    for model, options in zip(models, variants, strict=True):
        prune_structured(model, 0.4, **options)
    first, *others = (model(tokens).logits for model in models)
    for other in others:
        assert torch.allclose(first, other, atol=1e-5)


def test_compensation_restores_a_constant_channel(tokens):
    model = tiny("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            # Neurons whose output does not depend on the input.
            layer.fc1.weight[::3] = 0
            layer.fc1.bias[::3] = 0.7
    dense = copy.deepcopy(model)
    without = copy.deepcopy(model)
    report = prune_structured(
        model, 1 / 3, metric="ifv", structure="ul-um", target_modules=["mlp"], calibration=tokens
    )
    prune_structured(
        without, 1 / 3, metric="ifv", structure="ul-um", target_modules=["mlp"], calibration=tokens, compensate=False
    )
    assert report.removed == 1 / 3
    unseen = torch.randint(0, 61, (3, 9))
    assert torch.allclose(model(unseen).logits, dense(unseen).logits, atol=1e-5)
    assert not torch.allclose(without(unseen).logits, dense(unseen).logits, atol=1e-3)


@torch.no_grad()
def test_compensation_is_the_mean_of_what_is_lost(supported, tokens):
    inputs = inputs_by_hooks(supported, [{"input_ids": tokens}])
    dense = {units.output_name: copy.deepcopy(units.output) for units in find_units(supported)}
    prune_structured(supported, 0.4, calibration=tokens)
    lost = 0
    for units in find_units(supported):
        x, after, before = inputs[units.output_name], units.output, dense[units.output_name]
        errors = before(x) - after(x)
        assert errors.mean(0).abs().max() < 1e-5
        bare = before(x) - torch.nn.functional.linear(x, after.weight, before.bias)
        assert errors.norm() <= bare.norm()
        lost += bare.norm() - errors.norm()
    assert lost > 0


def test_pruning_again_to_the_same_ratio_changes_nothing(llama, tokens):
    prune_structured(llama, 0.4, calibration=tokens, compensate=False)
    before = copy.deepcopy(llama)
    prune_structured(llama, 0.4, calibration=tokens)
    assert_same_weights(llama, before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_units_go_at_ratio_zero_and_the_model_stays_as_it_was(llama, tokens, structure):
    before = copy.deepcopy(llama)
    prune_structured(llama, 0.0, structure=structure, calibration=tokens)
    assert_same_weights(llama, before)


ATTENTION = [f"model.layers.{i}.self_attn" for i in range(3)]
MLP = [f"model.layers.{i}.mlp" for i in range(3)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_modules": ["self_attn"]}, ATTENTION),
        ({"target_modules": ["q_proj"]}, ATTENTION),
        ({"target_modules": ["mlp"]}, MLP),
        ({"target_modules": r".*\.(up|down)_proj"}, MLP),
        ({"target_modules": "all-linear", "exclude_modules": ["self_attn"]}, MLP),
        ({"exclude_modules": ["gate_proj"]}, ATTENTION),
        ({"target_modules": ["model.layers.1.self_attn", "layers.2.mlp"]}, [ATTENTION[1], MLP[2]]),
        ({"exclude_modules": r"model\.layers\.[01]\..*"}, [ATTENTION[2], MLP[2]]),
        (
            {"target_modules": ["q_proj", "mlp"], "exclude_modules": r".*\.[02]\.self_attn"},
            [MLP[0], ATTENTION[1], *MLP[1:]],
        ),
    ],
)
def test_names_choose_attentions_and_mlps(llama, tokens, options, names):
    dense = copy.deepcopy(llama)
    report = prune_structured(llama, 0.3, tokens, **options)
    assert [layer.name for layer in report.layers] == names
    assert report.removed >= 0.3
    for name, weight in dense.state_dict().items():
        changed = not torch.equal(llama.state_dict()[name], weight)
        assert not changed or any(name.startswith(f"{chosen}.") for chosen in names), name


@pytest.mark.parametrize(
    ("family", "options", "kind"),
    [
        ("gpt_neox", {"target_modules": ["mlp"]}, "mlp"),
        ("mixtral", {"target_modules": ["self_attn"]}, "attention"),
        ("bart", {"exclude_modules": r".*\.decoder\..*"}, None),
    ],
)
def test_a_part_that_is_not_chosen_may_be_built_otherwise(family, options, kind, tmp_path):
    model, inputs = with_biases(family), inputs_of(family)
    report = prune_structured(model, 0.3, [inputs], **options)
    assert {layer.kind for layer in report.layers} == ({"attention", "mlp"} if kind is None else {kind})
    with torch.no_grad():
        masked, size = model(**inputs).logits, sum(parameter.numel() for parameter in model.parameters())
        compact(model).save_pretrained(tmp_path)
        assert size - sum(parameter.numel() for parameter in model.parameters()) >= report.parameters_removed
        assert torch.allclose(model(**inputs).logits, masked, atol=1e-5)
        auto = AutoModelForSeq2SeqLM if family == "bart" else AutoModelForCausalLM
        assert torch.equal(auto.from_pretrained(tmp_path).eval()(**inputs).logits, model(**inputs).logits)


def test_every_structure_keeps_a_unit_where_all_but_one_must_go(tokens):
    model = grouped(6)
    report = prune_structured(model, 0.8, structure="ul-um", calibration=tokens)
    assert {layer.kept for layer in report.layers if layer.kind == "attention"} == {1}


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_key_head_goes_with_all_its_query_heads(kv_heads, tokens):
    model = grouped(kv_heads)
    units = find_units(model)[0]
    assert (units.count, units.heads_per_unit, units.head_dim) == (kv_heads, 6 // kv_heads, 4)
    assert units.cost == (2 * 6 // kv_heads + 2) * 4 * 24
    report = prune_structured(model, 0.5, calibration=tokens)
    if kv_heads == 1:
        assert {layer.kept for layer in report.layers if layer.kind == "attention"} == {1}


def test_half_precision_is_measured_and_compensated_in_full(tokens):
    model = tiny("llama").to(torch.bfloat16)
    prune_structured(model, 0.3, calibration=tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tokens).logits.isfinite().all()


def test_reconstruction_repairs_what_was_removed(tokens):
    dense = tiny("llama")
    model = copy.deepcopy(dense)
    prune_structured(model, 0.4, calibration=tokens)
    zeros = zeros_of(model)
    target = dense(tokens).logits
    before = (model(tokens).logits - target).norm()
    reconstruct(model, calibration=tokens, dense=dense, fit=Fit(max_steps=20, learning_rate=1e-3))
    assert (model(tokens).logits - target).norm() < before
    assert all(found[zeros[name]].all() for name, found in zeros_of(model).items())


def test_masked_lora_is_lora_on_the_compact_model(tokens):
    masked = tiny("llama").double()
    prune_structured(masked, 0.4, calibration=tokens, compensate=False)
    small = compact(copy.deepcopy(masked))
    kept = [(~zero.all(1), ~zero.all(0)) for zero in zeros_of(masked).values()]
    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    one = get_peft_model(masked, MaskLoRAConfig(**options)).double()
    two = get_peft_model(small, LoraConfig(**options)).double()
    factors = {"A": [], "B": []}
    for model, lists in ((one, "mask_lora_"), (two, "lora_")):
        for factor in factors:
            factors[factor].append([p for n, p in model.named_parameters() if f"{lists}{factor}" in n])
    with torch.no_grad():
        for pair in factors.values():
            for large, little, (rows, columns) in zip(*pair, kept, strict=True):
                large.normal_()
                little.copy_(large[:, columns] if large.shape[0] == 2 else large[rows])
    assert torch.allclose(one(tokens).logits, two(tokens).logits, atol=1e-9)
    for model in (one, two):
        model(tokens, labels=tokens).loss.backward()
    for large, little, (_, columns) in zip(*factors["A"], kept, strict=True):
        assert torch.allclose(large.grad[:, columns], little.grad, atol=1e-9)
    merged = one.merge_and_unload()
    assert [bool(zero.all(1).any()) for zero in zeros_of(merged).values()] == [bool((~r).any()) for r, _ in kept]
    assert torch.allclose(compact(merged)(tokens).logits, two.merge_and_unload()(tokens).logits, atol=1e-9)

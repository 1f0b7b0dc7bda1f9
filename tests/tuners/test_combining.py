"""`add_weighted_adapter`: the combination computes the weighted sum of what the adapters add."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import ties

from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig
from peft_sparse.tuners.factors import layers_with

from test_layer_kinds import (
    KINDS,
    TUNERS,
    adapted,
    assert_base_untouched,
    assert_zeros_kept,
    config_of,
    output,
    product_form,
    saved,
    train,
    tuner_layers,
)


ADAPTERS, WEIGHTS = ["default", "second", "third"], [0.7, -0.3, 1.5]
KINDS_OF_LAYERS = pytest.mark.parametrize("name", ["mlp", "conv", "conv-grouped", "llama", "gpt2", "mixtral"])


@pytest.fixture(params=[*TUNERS, product_form], ids=["MaskLoRA", "ScaledLoRA", "ScaledLoRA, product"])
def tuner(request):
    return request.param


def three(kind, tuner, **options):
    """A model with three adapters of different ranks, scalings and layers."""
    model = adapted(kind, tuner, lora_alpha=5, **options)
    model.add_adapter("second", config_of(kind, tuner, r=2, use_rslora=True, init_weights=False, **options))
    first = next(name for name, _ in layers_with(model, "default").items() if "experts" not in name)
    few = {"r": 4, "target_modules": [first], "target_parameters": None, "init_weights": False}
    model.add_adapter("third", config_of(kind, tuner, **options | few))
    for layer in tuner_layers(model):
        layer.set_scale("second", 1.5)
    return model.eval()


def expected_updates(model, adapters=ADAPTERS, weights=WEIGHTS):
    """The weighted sum of the adapters' delta weights, by layer."""
    found = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in layers_with(model, adapter).items():
            found[name] = found.get(name, 0) + weight * layer.get_delta_weight(adapter)
    return found


def updates(model, adapter):
    return {name: layer.get_delta_weight(adapter) for name, layer in layers_with(model, adapter).items()}


def assert_same_updates(found, expected):
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=1e-4, atol=1e-5)


@KINDS_OF_LAYERS
def test_a_combination_is_the_exact_sum_and_survives_saving_and_merging(name, tuner, tmp_path):
    kind = KINDS[name]
    model = three(kind, tuner)
    before, expected = output(model, kind), expected_updates(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "sum")
    assert torch.equal(output(model, kind), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert_same_updates(updates(model, "sum"), expected)
    for key, layer in layers_with(model, "sum").items():
        config = model.peft_config["sum"]
        assert config.rank_and_alpha(key) == (layer.r["sum"], layer.lora_alpha["sum"])
        assert layer.scaling["sum"] == 1
    model.set_adapter("sum")
    combined = output(model, kind)
    saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path / "sum")
    torch.testing.assert_close(output(loaded, kind), combined)
    assert_base_untouched(loaded, kind)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(output(merged, kind), combined, rtol=1e-4, atol=1e-4)
    assert_zeros_kept(merged, kind)


def test_a_combination_can_be_trained_and_deleted(tuner):
    kind = KINDS["llama"]
    model = three(kind, tuner)
    before = output(model, kind)
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "sum")
    model.set_adapter("sum")
    combined = output(model, kind)
    train(model, kind, lr=1e-3)
    assert not torch.allclose(output(model, kind), combined, atol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("sum")
    torch.testing.assert_close(output(model, kind), before)


@KINDS_OF_LAYERS
@pytest.mark.parametrize("svd_rank", [2, 12])
def test_an_svd_is_the_best_approximation_of_the_sum(name, svd_rank, tuner):
    kind = KINDS[name]
    model = three(kind, tuner)
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "sum")
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "best", combination_type="svd", svd_rank=svd_rank)
    for layer in layers_with(model, "sum").values():
        A, B, _, _ = layer._factors(["sum"])
        low_A, low_B, _, _ = layer._factors(["best"])
        product, low = B @ A, low_B @ low_A
        rank = svd_rank + (tuner is product_form)
        assert layer.r["best"] == min(rank, *A.shape[-2:], B.shape[-2])
        lost = torch.linalg.svdvals(product)[..., rank:].square().sum(-1).sqrt()
        torch.testing.assert_close((product - low).norm(dim=(-2, -1)), lost, rtol=1e-3, atol=1e-4)
    if svd_rank == 12:
        assert_same_updates(updates(model, "best"), expected_updates(model))


def test_the_rank_of_an_svd_follows_the_adapters(tuner):
    model = three(KINDS["llama"], tuner)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "best", combination_type="svd")
    assert {layer.r["best"] for layer in layers_with(model, "best").values()} == {3 + (tuner is product_form)}


@pytest.mark.parametrize("name", ["mlp", "mixtral"])
def test_matrices_are_merged_by_the_functions_of_peft(name, tuner):
    kind = KINDS[name]
    model = three(kind, tuner)
    names, weights = ["default", "second"], [0.7, -0.4]
    options = {"density": 0.5, "svd_rank": 50, "majority_sign_method": "frequency"}
    model.add_weighted_adapter(names, weights, "merged", combination_type="ties_svd", **options)
    ones = 1 if tuner is product_form else 0
    for layer in layers_with(model, "merged").values():
        products = [(A, B, s) for A, B, _, s in (layer._factors([name]) for name in names)]
        matrices = [s * (B @ A - ones) for A, B, s in products]
        if matrices[0].dim() == 2:
            expected = ties(matrices, torch.tensor(weights), 0.5, "frequency")
        else:
            expected = torch.stack(
                [ties(list(pair), torch.tensor(weights), 0.5, "frequency") for pair in zip(*matrices, strict=True)]
            )
        A, B, _, _ = layer._factors(["merged"])
        torch.testing.assert_close(B @ A, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"])
def test_keeping_every_entry_gives_the_sum(kind, tuner):
    model = three(KINDS["mlp"], tuner)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        model.add_weighted_adapter(["default"], [0.5], "scaled", combination_type=kind, density=1.0, svd_rank=50)
    assert_same_updates(updates(model, "scaled"), expected_updates(model, ["default"], [0.5]))


def test_entries_of_an_svd_are_clamped_to_a_quantile(tuner):
    model = three(KINDS["mlp"], tuner)
    options = {"combination_type": "svd", "svd_rank": 2}
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "free", **options)
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "clamped", svd_clamp=0.8, **options)
    for layer in layers_with(model, "clamped").values():
        largest = {
            name: torch.cat([p.flatten() for p in (layer.A[name].weight, layer.B[name].weight)])
            for name in ("free", "clamped")
        }
        torch.testing.assert_close(largest["clamped"].abs().max(), largest["free"].quantile(0.8))


def test_one_adapter_is_scaled(tuner):
    model = three(KINDS["llama"], tuner)
    model.add_weighted_adapter(["second"], [-2.0], "negated", combination_type="linear")
    assert_same_updates(updates(model, "negated"), expected_updates(model, ["second"], [-2.0]))


@pytest.mark.parametrize(("first", "rank"), [(ScaledLoRAConfig, 6), (product_form, 7)])
def test_both_forms_of_scaled_lora_can_be_combined(first, rank, tmp_path):
    kind = KINDS["mlp"]
    model = adapted(kind, first)
    model.add_adapter("second", config_of(kind, ScaledLoRAConfig, init_weights=False))
    model.add_weighted_adapter(["default", "second"], [0.25, 0.5], "sum")
    assert (model.peft_config["sum"].r, model.peft_config["sum"].rank_pattern) == (rank, {})
    assert_same_updates(updates(model, "sum"), expected_updates(model, ["default", "second"], [0.25, 0.5]))
    model.set_adapter("sum")
    loaded = PeftModel.from_pretrained(kind.sparse(), saved(model, tmp_path) / "sum")
    torch.testing.assert_close(output(loaded, kind), output(model, kind))


def test_lora_prune_stays_lora_prune():
    kind = KINDS["mlp"]
    model = adapted(kind, MaskLoRAConfig, masking="merge")
    model.add_adapter("second", config_of(kind, MaskLoRAConfig, masking="merge", init_weights=False))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["default", "second"])
    both = output(model, kind)
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, kind), both)
    assert model.peft_config["sum"].masking == "merge"


def test_half_precision_is_summed_exactly_and_kept(tuner):
    kind = KINDS["mlp"]
    model = get_peft_model(
        kind.sparse().to(torch.bfloat16), config_of(kind, tuner, init_weights=False), autocast_adapter_dtype=False
    )
    model.add_adapter("second", config_of(kind, tuner, init_weights=False))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert {p.dtype for p in model.base_model.model[0].A["sum"].parameters()} == {torch.float32}
    model.add_weighted_adapter(["default"], [1.0], "same")
    assert {p.dtype for p in model.base_model.model[0].A["same"].parameters()} == {torch.bfloat16}


def test_adapters_of_one_mask_on_a_base_with_more_entries_keep_it(tuner, tmp_path):
    kind = KINDS["mlp"]
    for name in ("default", "second"):
        saved(adapted(kind, tuner, save_mask=True), tmp_path / name)
    # Another adapter, without a mask, needs the dense base.
    model = get_peft_model(kind.dense(), config_of(kind, tuner), adapter_name="dense").eval()
    for name in ("default", "second"):
        model.load_adapter(tmp_path / name, name)
    model.add_weighted_adapter(["default", "second"], [0.5, 1.0], "sum")
    model.set_adapter("sum")
    combined = output(model, kind)
    saved(model, tmp_path / "all")
    loaded = PeftModel.from_pretrained(kind.sparse(), tmp_path / "all" / "sum")
    torch.testing.assert_close(output(loaded, kind), combined)
    with pytest.raises(ValueError, match="different masks"):
        model.add_weighted_adapter(["default", "dense"], [0.5, 1.0], "more")
    model.set_adapter("dense")
    torch.testing.assert_close(output(model, kind), output(kind.dense(), kind))


@pytest.mark.parametrize("masked", [["default"], ["default", "second"]])
def test_a_combination_brings_the_mask_of_its_adapters(masked, tuner, tmp_path):
    kind = KINDS["llama"]
    model = adapted(kind, tuner, save_mask=True)
    model.add_adapter("second", config_of(kind, tuner, save_mask="second" in masked, init_weights=False))
    model.add_weighted_adapter(["default", "second"], [0.5, 1.0], "sum")
    model.set_adapter("sum")
    combined = output(model, kind)
    saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(kind.dense(), tmp_path / "sum")
    torch.testing.assert_close(output(loaded, kind), combined)
    assert_zeros_kept(loaded, kind)

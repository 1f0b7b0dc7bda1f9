import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_sparse import Criterion, MaskLoRAConfig, SemiStructured, Unstructured, prune, prune_checkpoint, sparsity
from peft_sparse.calibration.gradients import gradient_sums
from peft_sparse.model.blocks import find_blocks, prunable_weights
from peft_sparse.model.weights import WeightView
from peft_sparse.pruning.criteria import CRITERIA, Wanda
from peft_sparse.pruning.patterns import number_to_prune

from checks import assert_same_weights, assert_same_zeros, assert_zeros_kept, inputs_by_hooks, zeros_of
from conftest import EXPERTS, FAMILIES, inputs_of, tiny


# Each criterion once per row or matrix, or in groups of four.
RUNS = {"magnitude": 0.5, "random": "2:4", "wanda": "2:4", "ria": 0.5, "sparsegpt": "2:4", "gblm": 0.5}
SCORED = [name for name in CRITERIA if name != "sparsegpt"]


def calibration_of(family, sequences=24):
    batch = inputs_of(family, sequences)
    return [batch | {"labels": torch.randint(0, 2, (sequences,))}] if family == "vit" else [batch]


# -- every criterion on every family ---------------------------------------------------------------------------------


def cells():
    """Every criterion on every family: all on Llama and two on any other in each run, the others by `-m slow`."""
    for number, family in enumerate(FAMILIES):
        for index, criterion in enumerate(CRITERIA):
            often = family == "llama" or (number + index) % 3 == 0
            yield pytest.param(family, criterion, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("family", "criterion"), list(cells()))
def test_every_criterion_prunes_what_it_should_and_nothing_else_on_every_family(family, criterion):
    model, pattern = tiny(family).train(), RUNS[criterion]
    implementation = model.get_experts_implementation()
    weights = prunable_weights(model)
    taken = {id(weight.storage) for weight in weights.values()}
    untouched = {name: p.clone() for name, p in model.named_parameters() if id(p) not in taken}
    report = prune(model, pattern, criterion=criterion, calibration=calibration_of(family))
    assert [weight.name for weight in report.weights] == list(weights)
    assert sparsity(model) == report.sparsity == 0.5
    assert all(weight.sparsity == 0.5 for weight in report.weights)
    assert all(0 < weight.error < 1.5 for weight in report.weights)
    for name, parameter in model.named_parameters():
        if name in untouched:
            assert torch.equal(parameter, untouched[name]), name
    if pattern == "2:4":
        for zeros in zeros_of(model).values():
            assert (zeros.reshape(-1, 4).sum(1) == 2).all()
    assert all(module.training for module in model.modules())
    assert model.get_experts_implementation() == implementation


@pytest.mark.parametrize("criterion", SCORED)
def test_what_is_kept_keeps_its_value(criterion, llama, tokens):
    dense = copy.deepcopy(llama)
    prune(llama, 0.5, criterion=criterion, calibration=tokens)
    for name, weight in prunable_weights(llama).items():
        matrix, before = weight.matrix(), prunable_weights(dense)[name].matrix()
        assert torch.equal(matrix, before * (matrix != 0))


def test_magnitude_per_matrix_by_hand():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(3, 2, bias=False))])})
    model["layers"][0][0].weight.data = torch.tensor([[0.1, -3.0, 0.2], [2.0, -0.3, 1.0]])
    prune(model, 0.5)
    assert model["layers"][0][0].weight.tolist() == [[0.0, -3.0, 0.0], [2.0, 0.0, 1.0]]


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5"])
def test_batch_size_and_where_states_wait_change_no_mask(family):
    masks = []
    for options in ({}, {"batch_size": 4, "activations": "cpu"}, {"batch_size": 5, "activations": "disk"}):
        model, tokens = tiny(family), torch.randint(0, 61, (24, 12))
        prune(model, 0.5, criterion="ria", calibration=tokens, **options)
        masks.append(zeros_of(model))
    for other in masks[1:]:
        different = sum(int((masks[0][name] != zeros).sum()) for name, zeros in other.items())
        assert different <= 4, "more than a near tie that rounding decides"


def test_half_precision_ties_are_counted_exactly(llama):
    prune(llama.bfloat16(), 0.6, group="row")
    for name, zeros in zeros_of(llama).items():
        by_row, lower = zeros.sum(1), math.floor(0.6 * zeros.shape[1])
        assert zeros.sum() == math.floor(round(0.6 * zeros.numel(), 6)), name
        assert ((by_row == lower) | (by_row == lower + 1)).all(), name


@pytest.mark.parametrize("criterion", SCORED)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_pruning_again_changes_nothing_and_pruning_further_only_adds(llama, tokens, criterion, group):
    prune(llama, 0.5, criterion=criterion, group=group, calibration=tokens)
    once = zeros_of(llama)
    prune(llama, 0.5, criterion=criterion, group=group, calibration=tokens)
    assert_same_zeros(llama, once)
    prune(llama, 0.75, criterion=criterion, group=group, calibration=tokens)
    assert sparsity(llama) == 0.75
    assert_zeros_kept(llama, once)


def test_sparsegpt_prunes_further_without_losing_a_zero(llama, tokens):
    prune(llama, 0.5, criterion="sparsegpt", calibration=tokens)
    once = zeros_of(llama)
    prune(llama, 0.5, criterion="sparsegpt", calibration=tokens)
    assert_same_zeros(llama, once)
    prune(llama, 0.75, criterion="sparsegpt", calibration=tokens)
    assert sparsity(llama) == 0.75
    assert_zeros_kept(llama, once)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_groups_differ_as_they_say(llama):
    by_row, by_matrix, by_model = (copy.deepcopy(llama) for _ in range(3))
    with torch.no_grad():
        for one in (by_row, by_matrix, by_model):
            one.model.layers[0].mlp.up_proj.weight[0] *= 100
            one.model.layers[1].mlp.up_proj.weight *= 100
    for one, group in ((by_row, "row"), (by_matrix, "matrix"), (by_model, "model")):
        report = prune(one, 0.5, group=group)
        assert sparsity(one) == 0.5
        assert report.group == group
    zeros = {group: zeros_of(m) for group, m in (("row", by_row), ("matrix", by_matrix), ("model", by_model))}
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert (zeros["row"][first].sum(1) == 8).all()
    assert zeros["matrix"][first][0].sum() == 0
    assert zeros["matrix"][second].float().mean() == 0.5
    assert zeros["model"][second].float().mean() < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_wanda_across_the_model_is_one_threshold_on_what_the_dense_model_measures(family):
    model, batches = tiny(family), calibration_of(family)
    inputs = inputs_by_hooks(model, batches)
    scores = {
        name: weight.matrix().abs() * inputs[name].norm(dim=0) for name, weight in prunable_weights(model).items()
    }
    every = torch.cat([score.flatten() for score in scores.values()])
    lowest = every.sort().values[: math.floor(0.6 * len(every))]
    report = prune(model, 0.6, criterion="wanda", group="model", calibration=batches)
    zeros = zeros_of(model)
    wrong = sum(int((zeros[name] != (score <= lowest[-1])).sum()) for name, score in scores.items())
    assert wrong <= 2, "more than a near tie at the threshold that rounding decides"
    assert sum(int(zero.sum()) for zero in zeros.values()) == len(lowest)
    assert report.error is None
    assert len({weight.sparsity for weight in report.weights}) > 3


def test_random_across_the_model_repeats_with_the_seed(llama):
    other = copy.deepcopy(llama)
    torch.manual_seed(5)
    prune(llama, 0.5, criterion="random", group="model")
    torch.manual_seed(5)
    prune(other, 0.5, criterion="random", group="model")
    zeros = zeros_of(llama)
    assert_same_zeros(other, zeros)
    assert not torch.equal(zeros["model.layers.0.mlp.up_proj"], zeros["model.layers.1.mlp.up_proj"])


# -- the user's own criterion ----------------------------------------------------------------------------------------


def test_a_function_scores_as_a_named_criterion_does(llama, tokens):
    seen = []

    def mine(weight, statistics):
        seen.append(statistics)
        return weight.abs().float() * statistics.input_norm

    other = copy.deepcopy(llama)
    report = prune(llama, 0.5, criterion=mine, calibration=tokens)
    prune(other, 0.5, criterion="wanda", group="matrix", calibration=tokens)
    assert_same_weights(llama, other)
    assert (report.criterion, report.group) == ("mine", "matrix")
    assert len(seen) == 21
    assert {(s.tokens, s.sequences, s.hessian, s.gradient) for s in seen} == {(72, 6, None, None)}


def test_a_function_needs_no_calibration(llama):
    other = copy.deepcopy(llama)
    prune(llama, 0.5, criterion=lambda weight, statistics: weight.abs() if statistics.input_norm is None else None)
    prune(other, 0.5)
    assert_same_weights(llama, other)


@pytest.mark.parametrize("group", ["row", "matrix", "model"])
def test_a_function_is_given_the_input_norms_whatever_the_group(llama, tokens, group):
    other = copy.deepcopy(llama)
    prune(llama, 0.5, criterion=lambda *args: Wanda().score(*args), group=group, calibration=tokens)
    prune(other, 0.5, criterion="wanda", group=group, calibration=tokens)
    assert_same_weights(llama, other)


def test_a_criterion_says_what_it_needs_and_compares(llama, tokens):
    dense = copy.deepcopy(llama)
    inputs = inputs_by_hooks(dense, [{"input_ids": tokens}])
    gradients = gradient_sums(dense, prunable_weights(dense), [{"input_ids": tokens}])
    first = "model.layers.0.self_attn.q_proj"
    seen = []

    def score(weight, statistics):
        seen.append(statistics)
        return weight.square() * statistics.hessian.diagonal() + statistics.gradient

    rule = Criterion(score, group="row", needs=("hessian", "gradients"))
    report = prune(llama, 0.25, criterion=rule, calibration=tokens)
    assert (report.criterion, report.group) == ("score", "row")
    assert all((zeros.sum(1) == zeros.shape[1] // 4).all() for zeros in zeros_of(llama).values())
    torch.testing.assert_close(seen[0].hessian, inputs[first].T @ inputs[first])
    torch.testing.assert_close(seen[0].gradient, gradients[first], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", {"q_proj": "2:4", "k_proj": "1:4"}])
def test_n_of_m_has_its_own_group_whatever_the_criterions(llama, pattern):
    report = prune(llama, pattern, criterion=Criterion(lambda weight, _: weight.abs(), group="model"))
    assert report.group is None
    assert (zeros_of(llama)["model.layers.0.self_attn.q_proj"].reshape(-1, 4).sum(1) == 2).all()


# -- a pattern for each layer ----------------------------------------------------------------------------------------


def test_the_first_key_that_matches_counts_and_the_rest_is_left_alone(llama):
    dense = copy.deepcopy(llama)
    report = prune(llama, {r"layers\.[01]\.mlp\.\w+_proj": 0.25, "down_proj": "2:4", "model.layers.2.mlp.up_proj": 0})
    found = {weight.name: weight.sparsity for weight in report.weights}
    expected = {f"model.layers.{i}.mlp.{kind}_proj": 0.25 for i in (0, 1) for kind in ("gate", "up", "down")}
    expected |= {"model.layers.2.mlp.up_proj": 0.0, "model.layers.2.mlp.down_proj": 0.5}
    assert found == expected
    assert report.pattern == r"layers\.[01]\.mlp\.\w+_proj: 0.25, down_proj: 2:4, model.layers.2.mlp.up_proj: 0"
    assert (zeros_of(llama)["model.layers.2.mlp.down_proj"].reshape(-1, 4).sum(1) == 2).all()
    for name, parameter in dense.named_parameters():
        if name.removesuffix(".weight") not in expected or expected[name.removesuffix(".weight")] == 0:
            assert torch.equal(llama.get_parameter(name), parameter), name


def test_keys_match_whole_names_or_whole_parts_at_their_end(llama):
    keys = {"o_proj": 0.75, "k_proj|v_proj": 0.5, r"model\.layers\.2\..*": 0.25}
    for weight in prune(llama, keys).weights:
        ending = weight.name.rpartition(".")[2]
        assert weight.sparsity == {"o_proj": 0.75, "k_proj": 0.5, "v_proj": 0.5}.get(ending, 0.25)
        assert ending in ("o_proj", "k_proj", "v_proj") or ".2." in weight.name
    with pytest.raises(ValueError, match="'_proj' in `pattern` matches no weight"):
        prune(llama, {"_proj": 0.5})


def test_one_key_speaks_for_all_experts_of_a_parameter():
    model = tiny("mixtral")
    report = prune(model, {r"layers\.1\.mlp\.experts\.down_proj\.2": 0.75, "down_proj": 0.5, "gate_up_proj": "1:4"})
    found = {weight.name: weight.sparsity for weight in report.weights}
    assert len(found) == 2 * 2 * 4
    for name, share in found.items():
        special = name == "model.layers.1.mlp.experts.down_proj.2"
        assert share == (0.75 if special or "gate_up" in name else 0.5), name
    assert not (model.model.layers[0].self_attn.q_proj.weight == 0).any()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_dict_may_mix_patterns_under_calibration(llama, tokens, criterion):
    dense = copy.deepcopy(llama)
    prune(llama, {"q_proj": "2:4", "up_proj": 0.5, "down_proj": 0.75}, criterion=criterion, calibration=tokens)
    zeros = zeros_of(llama)
    for index in range(3):
        block = f"model.layers.{index}"
        assert (zeros[f"{block}.self_attn.q_proj"].reshape(-1, 4).sum(1) == 2).all()
        assert zeros[f"{block}.mlp.up_proj"].float().mean() == 0.5
        assert zeros[f"{block}.mlp.down_proj"].float().mean() == 0.75
        for name in (f"{block}.self_attn.k_proj", f"{block}.mlp.gate_proj"):
            assert torch.equal(llama.get_submodule(name).weight, dense.get_submodule(name).weight)


@settings(deadline=None, max_examples=25)
@given(
    shares=st.dictionaries(
        st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        st.fractions(0, Fraction(99, 100), max_denominator=100),
        min_size=1,
    ),
    group=st.sampled_from(["row", "matrix"]),
)
def test_every_layer_loses_exactly_its_share(shares, group):
    model = tiny("llama")
    prune(model, {name: float(share) for name, share in shares.items()}, group=group)
    for name, zeros in zeros_of(model).items():
        share = shares.get(name.rpartition(".")[2], 0)
        assert zeros.sum() == math.floor(share * zeros.numel()), name
        if group == "row":
            assert zeros.sum(1).max() - zeros.sum(1).min() <= 1, name


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bart"])
def test_every_weights_error_is_that_of_its_outputs(family, criterion):
    model, batches = tiny(family), calibration_of(family)
    dense = copy.deepcopy(model)
    report = prune(model, 0.5, criterion=criterion, calibration=batches)
    errors = {weight.name: weight.error for weight in report.weights}
    before, after = prunable_weights(dense), prunable_weights(model)
    # The first block of each stack is measured on what the stack is given: pruned, as far as it runs before.
    stack = "model.decoder" if family == "bart" else "model"
    if family == "bart":
        dense.model.encoder = model.model.encoder
    inputs = inputs_by_hooks(dense, batches)
    checked = [name for name in errors if name.startswith(f"{stack}.layers.0.")]
    assert len(checked) > 6
    for name in checked:
        X, W, pruned = inputs[name], before[name].matrix(), after[name].matrix()
        expected = (X @ (W - pruned).T).norm() / (X @ W.T).norm()
        assert errors[name] == pytest.approx(expected.item(), rel=1e-3)
    assert report.error == pytest.approx(sum(errors.values()) / len(errors))


def test_without_calibration_there_is_no_error(llama):
    report = prune(llama, 0.5)
    assert report.error is None
    assert {weight.error for weight in report.weights} == {None}


def test_magnitude_reports_its_errors_if_given_calibration_and_prunes_the_same(llama, tokens):
    other = copy.deepcopy(llama)
    report = prune(llama, 0.5, calibration=tokens)
    prune(other, 0.5)
    assert_same_weights(llama, other)
    assert 0 < report.error < 1


def test_on_inputs_with_outliers_each_criterion_serves_the_outputs_better_than_the_one_before(tokens):
    errors = []
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        model = tiny("llama")
        model.model.embed_tokens.weight.data[:, :3] *= 30
        for index, layer in enumerate(model.model.layers):
            layer.post_attention_layernorm.weight.data[index : index + 3] *= 10
        errors.append(prune(model, 0.5, criterion=criterion, calibration=tokens, batch_size=6).error)
    magnitude, by_inputs, with_update = errors
    assert by_inputs < 0.9 * magnitude
    assert with_update < 0.9 * by_inputs


def test_too_few_tokens_for_a_hessian_are_told_once_with_their_number(llama, tokens):
    with pytest.warns(UserWarning, match="has 16 columns and was measured on 7 tokens.* at least 16 tokens") as caught:
        prune(llama, 0.5, criterion="sparsegpt", calibration=tokens[:1, :7])
    assert len(caught) == 1
    assert sparsity(llama) == 0.5


# -- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_crash_leaves_the_blocks_before_it_pruned_and_says_where(llama, tokens):
    dense, whole = copy.deepcopy(llama), copy.deepcopy(llama)
    options = {"criterion": "wanda", "calibration": tokens, "batch_size": 1}
    prune(whole, 0.5, **options)
    batches = []

    def fail_later(module, args):
        batches.append(0)
        # The proof takes the first three, and the record of all batches one each.
        if len(batches) > 3 + len(tokens):
            raise RuntimeError("out of luck")

    hook = llama.model.layers[1].register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        prune(llama, 0.5, **options)
    assert caught.value.__notes__ == [
        "While pruning block 'model.layers.1': the blocks before it are pruned, and the blocks after it are not."
    ]
    assert_prefix(llama, dense, whole, pruned=1)
    # Pruning goes on where it stopped.
    hook.remove()
    prune(llama, 0.5, **options)
    assert_same_weights(llama, whole)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_criterion_that_fails_is_reported_with_its_weight(llama, tokens, calibrated):
    dense, whole = copy.deepcopy(llama), copy.deepcopy(llama)
    prune(whole, 0.5, criterion=lambda weight, _: weight.abs())
    done = []

    def fails_at_the_sixteenth(weight, statistics):
        done.append(0)
        if len(done) == 15:
            raise ZeroDivisionError
        return weight.abs()

    with pytest.raises(ZeroDivisionError) as caught:
        prune(llama, 0.5, criterion=fails_at_the_sixteenth, calibration=tokens if calibrated else None)
    assert caught.value.__notes__ == [
        "At 'model.layers.2.self_attn.q_proj': the weights before it are pruned.",
        "While pruning block 'model.layers.2': the blocks before it are pruned, and the blocks after it are not.",
    ]
    assert_prefix(llama, dense, whole, pruned=2)


def assert_prefix(model, dense, whole, pruned):
    """The first blocks are those of `whole`, the others those of `dense`."""
    blocks = zip(*(find_blocks(one).values() for one in (model, dense, whole)), strict=True)
    for index, (found, before, after) in enumerate(blocks):
        assert_same_weights(found, after if index < pruned else before)


def test_a_failure_across_the_model_changes_nothing(llama, tokens):
    dense, calls = copy.deepcopy(llama), []

    def fails_at_last(weight, statistics):
        calls.append(0)
        if len(calls) == 3 * 21:
            raise ZeroDivisionError
        return weight.abs()

    with pytest.raises(ZeroDivisionError):
        prune(llama, 0.5, criterion=fails_at_last, group="model", calibration=tokens)
    assert_same_weights(llama, dense)


# -- where weights are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, "model"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_blocks_are_moved_to_the_device_for_their_turn_and_back(llama, tokens, group, calibrated):
    other, moves = copy.deepcopy(llama), []
    names = {id(block): name for name, block in find_blocks(llama).items()}
    for block in find_blocks(llama).values():
        block.to = lambda device, block=block: moves.append((names[id(block)], str(device)))
    options = {"criterion": "wanda", "calibration": tokens} if calibrated else {}
    prune(llama, 0.5, group=group, device="cuda:7", **options)
    prune(other, 0.5, group=group, **options)
    assert_same_weights(llama, other)
    assert {name for name, _ in moves} == set(names.values())
    for there, back in zip(moves[::2], moves[1::2], strict=True):
        assert there[0] == back[0]
        assert (there[1], back[1]) == ("cuda:7", "cpu")
    if not calibrated:
        # A comparison across the model takes three passes over its scores, and each moves a block once.
        assert len(moves) == 2 * len(names) * (3 if group == "model" else 1)


# -- adapters, ties, shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", *EXPERTS])
def test_pruning_below_an_attached_adapter(family, criterion):
    batches = calibration_of(family)
    config = {"target_modules": "all-linear"}
    if family in EXPERTS:
        config = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    model = get_peft_model(tiny(family), MaskLoRAConfig(r=2, **config)).eval()
    report = prune(model, 0.5, criterion=criterion, calibration=batches)
    assert sparsity(model) == report.sparsity == 0.5
    plain = tiny(family)
    prune(plain, 0.5, criterion=criterion, calibration=batches)
    assert_same_zeros(model, zeros_of(plain))


def test_gradients_are_measured_below_an_adapter_that_is_switched_off(llama, tokens):
    plain = copy.deepcopy(llama)
    model = get_peft_model(llama, MaskLoRAConfig(r=2, target_modules="all-linear"))
    with model.disable_adapter():
        prune(model, 0.5, criterion="gblm", calibration=tokens)
    prune(plain, 0.5, criterion="gblm", calibration=tokens)
    assert_same_zeros(model, zeros_of(plain))


def test_a_tied_weight_is_pruned_when_asked_for():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    prune(model, 0.5, target_modules=["lm_head"], prune_tied=True)
    assert (model.transformer.wte.weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_ties_stay_ties(family):
    model = tiny(family)
    prune(model, 0.5, criterion="wanda", calibration=calibration_of(family))
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert torch.equal(embedding, tiny(family).get_input_embeddings().weight)


def test_ragged_groups_are_pruned_when_asked_for():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(6, 5))])})
    prune(model, SemiStructured(2, 4, allow_ragged=True))
    matrix = WeightView(model["layers"][0][0]).matrix()
    assert ((matrix[:, :4] != 0).sum(1) == 2).all()
    assert (matrix[:, 4:] != 0).all()


def test_layers_outside_the_blocks_are_pruned_without_calibration(llama):
    report = prune(llama, 0.5, target_modules=["lm_head", "q_proj"])
    assert (llama.lm_head.weight == 0).float().mean() == 0.5
    assert len(report.weights) == 4


def test_a_comparison_per_row_reaches_the_asked_sparsity(llama, tokens):
    # 0.61 of 16 inputs is 9.76, of 24 inputs 14.64.
    report = prune(llama, 0.61, tokens, criterion="wanda")
    for weight in report.weights:
        entries = weight.shape[0] * weight.shape[1]
        assert round(weight.sparsity * entries) == number_to_prune(0.61, entries)
    lower = prune(tiny("llama"), Unstructured(0.61, exact=False), tokens, criterion="wanda")
    assert {weight.sparsity for weight in lower.weights} == {9 / 16, 14 / 24}


def test_a_sparsity_is_another_way_to_write_a_pattern(llama):
    other = tiny("llama")
    assert prune(llama, sparsity=0.5).pattern == prune(other, 0.5).pattern == "0.5"
    assert_same_weights(llama, other)


def test_asking_for_fewer_zeros_than_there_are_warns_with_both_numbers(llama, tokens, tmp_path):
    prune(llama, 0.6)
    llama.save_pretrained(tmp_path / "pruned")
    zeros = zeros_of(llama)
    with pytest.warns(UserWarning, match="A sparsity of 0.5000 was requested, and the weights now have 0.59"):
        prune(llama, 0.5)
    assert_zeros_kept(llama, zeros)
    with pytest.warns(UserWarning, match="A sparsity of 0.5000 was requested"):
        prune(llama, "2:4", tokens, criterion="wanda", allocation="owl")
    with pytest.warns(UserWarning, match="A sparsity of 0.5000 was requested"):
        prune_checkpoint(tmp_path / "pruned", tmp_path / "again", "2:4")


def test_pruning_to_the_same_or_a_higher_sparsity_does_not_warn(llama, tokens):
    for pattern in (0.5, 0.5, 0.6, Unstructured(0.61, exact=False), 0.61):
        prune(llama, pattern, tokens, criterion="wanda")


def test_a_criterion_that_writes_into_the_weight_changes_no_weight(tokens):
    found = []
    for score in (lambda weight, statistics: weight.abs(), lambda weight, statistics: weight.abs_()):
        model = tiny("llama")
        prune(model, 0.5, tokens, criterion=score)
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.float16])
def test_scores_may_be_of_any_real_dtype_and_zeros_stay_zero(kind):
    model = tiny("llama")
    prune(model, 0.25)
    zeros = {name: weight.matrix() == 0 for name, weight in prunable_weights(model).items()}
    prune(model, 0.5, criterion=lambda weight, statistics: (weight.abs() * 1000).to(kind))
    assert sparsity(model) == 0.5
    for name, weight in prunable_weights(model).items():
        assert (weight.matrix()[zeros[name]] == 0).all(), name

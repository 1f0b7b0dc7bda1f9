import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from peft_sparse.calibration.gradients import gradient_sums
from peft_sparse.calibration.measure import measure, relative_error
from peft_sparse.calibration.runner import stack_runners
from peft_sparse.calibration.statistics import InputStatistics, rows_taken
from peft_sparse.model.blocks import prunable_weights
from peft_sparse.pruning.prune import prune

from checks import inputs_by_hooks
from conftest import ENCODER_DECODERS, EXPERTS, FAMILIES, VOCABULARY, inputs_of, tiny


def measured(model, batches, needs=("inputs",), activations="device"):
    """The statistics of every prunable weight of the unpruned model."""
    weights, found = prunable_weights(model), {}
    for runner in stack_runners(model, batches, activations=activations):
        for index, block in enumerate(runner.names):
            inside = {name: weight for name, weight in weights.items() if name.startswith(f"{block}.")}
            statistics = measure(model, runner, index, inside, needs)
            found |= {name: statistics.of(name) for name in inside}
            runner.advance(index)
    assert found.keys() == weights.keys()
    return found


def assert_measures(found, inputs):
    for name, rows in inputs.items():
        assert found[name].tokens == len(rows), name
        torch.testing.assert_close(found[name].input_norm, rows.norm(dim=0), rtol=1e-4, atol=1e-5, msg=name)
        if found[name].hessian is not None:
            torch.testing.assert_close(found[name].hessian, rows.T @ rows, rtol=1e-4, atol=1e-4, msg=name)


# -- what is measured ----------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_concatenated_inputs(family):
    model, batch = tiny(family), inputs_of(family)
    implementation = model.get_experts_implementation()
    expected = inputs_by_hooks(model, [batch])
    for needs in (("inputs",), ("hessian",)):
        found = measured(model, [batch], needs)
        assert_measures(found, expected)
        assert all((statistics.hessian is not None) == ("hessian" in needs) for statistics in found.values())
    assert model.get_experts_implementation() == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_experts_implementation_comes_back_after_an_error():
    model = tiny("mixtral")
    runner = next(stack_runners(model, [inputs_of("mixtral")]))
    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(model, runner, 0, prunable_weights(model, r".*layers\.0\..*"), ("inputs",))
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if "experts" in name)


def fail(*args):
    raise RuntimeError("out of luck")


def lengths(batch):
    """Another length for each sequence of a batch, the longest as long as the batch."""
    return [batch.shape[1] - 2 * (index % 3) for index in range(len(batch))]


def pad(rows, sizes, side):
    """Tokens of which each row keeps its first `size`, moved to the other end of `side`, and their mask."""
    padded, mask = torch.full_like(rows, 5), torch.zeros_like(rows)
    for row, size, target, kept in zip(rows, sizes, padded, mask, strict=True):
        place = slice(0, size) if side == "right" else slice(len(row) - size, None)
        target[place], kept[place] = row[:size], 1
    return padded, mask


# BART numbers the positions of padding too: padded on the left, it is another model.
PADDED = [(f, side) for f in FAMILIES for side in ("left", "right") if f != "vit" and (f, side) != ("bart", "left")]


@pytest.mark.parametrize(("family", "side"), PADDED)
def test_padding_is_not_counted(family, side):
    model, whole = tiny(family), inputs_of(family)
    sides = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
    sizes = {name: lengths(rows) for name, rows in whole.items()}
    alone = [
        {name: rows[i : i + 1, : sizes[name][i]] for name, rows in whole.items()}
        for i in range(len(whole["input_ids"]))
    ]
    batch = {}
    for name, rows in whole.items():
        batch[name], batch[sides[name]] = pad(rows, sizes[name], side)
    if family not in ENCODER_DECODERS:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_measures(measured(model, [batch], ("hessian",)), inputs_by_hooks(model, alone))


def test_the_encoders_states_are_measured_with_the_encoders_mask():
    """Of equal lengths on both sides, so that a mask of the wrong side would fit."""
    model = tiny("t5")
    tokens = torch.randint(0, VOCABULARY, (3, 8))
    encoder, decoder = torch.ones(3, 8).long(), torch.ones(3, 8).long()
    encoder[:, 5:], decoder[:, 2:] = 0, 0
    batch = {"input_ids": tokens, "attention_mask": encoder}
    batch |= {"decoder_input_ids": tokens, "decoder_attention_mask": decoder}
    found = measured(model, [batch])
    block = "decoder.block.1.layer"
    assert found[f"{block}.0.SelfAttention.k"].tokens == found[f"{block}.1.EncDecAttention.q"].tokens == 3 * 2
    assert found[f"{block}.1.EncDecAttention.k"].tokens == 3 * 5
    assert found["encoder.block.1.layer.0.SelfAttention.k"].tokens == 3 * 5


def test_inputs_that_layers_share_are_measured_once(llama, tokens):
    runner = next(stack_runners(llama, [{"input_ids": tokens}]))
    weights = prunable_weights(llama, r".*layers\.0\..*")
    inputs = measure(llama, runner, 0, weights, ("hessian",)).inputs
    kinds = [{name.rpartition(".")[2] for name in weights if inputs[name] is one} for one in inputs.values()]
    assert {frozenset(kind) for kind in kinds} == {
        frozenset(["q_proj", "k_proj", "v_proj"]),
        frozenset(["o_proj"]),
        frozenset(["gate_proj", "up_proj"]),
        frozenset(["down_proj"]),
    }


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_convolution_is_measured_by_its_patches(adapted):
    stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    model = nn.Sequential(nn.ModuleList([nn.Sequential(stem)]))
    model.forward = lambda pixels: model[0][0](pixels)
    if adapted:
        get_peft_model(model, LoraConfig(target_modules=["0.0.0"]))
    pixels = torch.randn(2, 3, 6, 6)
    found = measured(model, [{"pixels": pixels}], ("hessian",))["0.0.0"]
    patches = nn.functional.unfold(pixels, 3, padding=1, stride=2).mT.flatten(0, 1)
    torch.testing.assert_close(found.hessian, patches.T @ patches)
    torch.testing.assert_close(stem(pixels).flatten(2).mT.flatten(0, 1), patches @ stem.weight.flatten(1).T)


# -- independence --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    hessian=st.booleans(),
)
def test_however_rows_are_split_the_statistics_are_the_same(sizes, order, hessian):
    rows = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(sum(sizes)))
    parts = list(rows.split(sizes))
    order.shuffle(parts)
    statistics = InputStatistics(hessian_wanted=hessian)
    for part in parts:
        statistics.update(part)
    statistics.finish()
    assert statistics.tokens == len(rows)
    torch.testing.assert_close(statistics.input_norm, rows.norm(dim=0))
    if hessian:
        torch.testing.assert_close(statistics.hessian, rows.T @ rows)


def test_a_wide_hessian_is_summed_in_panels():
    rows = torch.randn(40, 1100)
    statistics = InputStatistics(hessian_wanted=True)
    statistics.update(rows[:15])
    statistics.update(rows[15:])
    statistics.finish()
    torch.testing.assert_close(statistics.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert torch.equal(statistics.hessian, statistics.hessian.T)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_sums_are_kept_in_float32_or_wider(dtype, wide):
    rows = torch.full((1000, 2), 0.1, dtype=dtype)
    norms, hessian = InputStatistics(), InputStatistics(hessian_wanted=True)
    for statistics in (norms, hessian):
        for part in rows.split(10):
            statistics.update(part)
        statistics.finish()
        assert statistics.input_norm.dtype == wide
        torch.testing.assert_close(statistics.input_norm, rows.to(wide).norm(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("hessian", [False, True])
def test_moments_are_exact_where_the_mean_is_far_from_zero(hessian):
    rows = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0, -50.0])
    statistics = InputStatistics(hessian_wanted=hessian, moments_wanted=True)
    for part in rows.split(100):
        statistics.update(part)
    statistics.finish()
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.variance, rows.var(0, correction=0), rtol=1e-2, atol=0)
    assert InputStatistics().mean is None


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("batches", [1, 3])
def test_some_rows_are_kept_to_estimate_errors_on(rows, batches):
    quota = -(-1024 // batches)
    statistics = InputStatistics(rows_per_batch=quota)
    for _ in range(batches):
        statistics.update(torch.randn(rows, 2))
    kept = min(rows, quota) * batches
    assert sum(map(len, statistics.sampled)) == kept
    # Memory is taken for several batches together.
    assert sum(map(len, statistics.rooms)) == rows_taken([rows] * batches) < kept + 256


def test_the_rows_kept_are_spread_over_the_batch():
    statistics = InputStatistics(rows_per_batch=4)
    statistics.update(torch.arange(10.0)[:, None])
    statistics.update(torch.arange(3.0)[:, None])
    statistics.update(torch.zeros(0, 1))
    assert torch.cat(statistics.sampled).flatten().tolist() == [0, 2, 5, 7, 0, 1, 2]
    assert statistics.tokens == 13


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "t5", *EXPERTS])
def test_batch_size_order_and_where_states_wait_do_not_matter(family, padding):
    model, batch = tiny(family), inputs_of(family)
    if padding:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for number, size in enumerate((0, 3, 1, 0, 5, 2)):
            batch["attention_mask"][number, len(batch["attention_mask"][number]) - size :] = 0

    def part(index):
        return {name: rows[index] for name, rows in batch.items()}

    expected = measured(model, [part(slice(0, 6))], ("hessian",))
    splits = {
        "device": [part(slice(i, i + 1)) for i in range(6)],
        "cpu": [part(slice(4, 6)), part(slice(0, 4))],
        "disk": [part([5, 1, 2]), part([3, 0, 4])],
    }
    for activations, batches in splits.items():
        for name, found in measured(model, batches, ("hessian",), activations).items():
            assert found.tokens == expected[name].tokens
            torch.testing.assert_close(found.hessian, expected[name].hessian, rtol=1e-4, atol=1e-4)


def test_labels_and_other_inputs_of_the_model_may_be_there(llama, tokens):
    expected = measured(llama, [{"input_ids": tokens}])
    for name, found in measured(llama, [{"input_ids": tokens, "labels": tokens}]).items():
        assert torch.equal(found.input_norm, expected[name].input_norm)


# -- gradients -----------------------------------------------------------------------------------------------------


def sums_by_hand(model, batches):
    """Σ_n |∂L_n/∂W| of every weight, each sequence of `batches` a batch of its own."""
    sums = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, weight in prunable_weights(model).items():
            gradient = weight.matrix_of(weight.storage.grad).abs()
            sums[name] = sums.get(name, 0) + gradient
    model.zero_grad(set_to_none=True)
    return sums


def assert_sums(found, expected):
    assert found.keys() == expected.keys()
    assert sum(bool(total.any()) for total in expected.values()) > len(expected) - 3
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_gradients_are_summed_by_sequence_whatever_the_batches(family, batch_size, tokens):
    model = tiny(family)
    expected = sums_by_hand(model, [{"input_ids": row[None], "labels": row[None]} for row in tokens])
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    inputs = [{"input_ids": rows} for rows in tokens.split(batch_size)]
    found = gradient_sums(model, prunable_weights(model), inputs)
    assert_sums(found, expected)
    assert all(p.grad is None and p.requires_grad == (p is model.lm_head.weight) for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_padding_are_not_counted(llama, tokens, side):
    sizes = lengths(tokens)
    alone = [row[None, :size] for row, size in zip(tokens, sizes, strict=True)]
    expected = sums_by_hand(llama, [{"input_ids": row, "labels": row} for row in alone])
    padded, mask = pad(tokens, sizes, side)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert_sums(gradient_sums(llama, prunable_weights(llama), [batch]), expected)


def test_an_encoder_decoder_learns_from_its_decoders_next_tokens():
    model, batch = tiny("t5"), inputs_of("t5")
    labels = batch["decoder_input_ids"].roll(-1, 1)
    labels[:, -1] = -100
    singles = [
        {"input_ids": a[None], "decoder_input_ids": b[None], "labels": c[None]}
        for a, b, c in zip(*batch.values(), labels, strict=True)
    ]
    assert_sums(gradient_sums(model, prunable_weights(model), [batch]), sums_by_hand(model, singles))


def test_given_labels_are_used():
    model, batch = tiny("vit"), inputs_of("vit")
    batch["labels"] = torch.tensor([0, 1, 0, 1, 1, 0])
    singles = [{name: rows[i : i + 1] for name, rows in batch.items()} for i in range(6)]
    assert_sums(gradient_sums(model, prunable_weights(model), [batch]), sums_by_hand(model, singles))


def test_gradients_that_training_has_accumulated_are_left_alone(llama, tokens):
    weights, inputs = prunable_weights(llama), [{"input_ids": tokens}]
    expected = gradient_sums(llama, weights, inputs)
    llama(input_ids=tokens, labels=tokens).loss.backward()
    before = {name: parameter.grad for name, parameter in llama.named_parameters()}
    copies = {name: gradient.clone() for name, gradient in before.items()}
    assert_sums(gradient_sums(llama, weights, inputs), expected)
    for name, parameter in llama.named_parameters():
        assert parameter.grad is before[name]
        assert torch.equal(parameter.grad, copies[name])


def test_small_gradients_survive_half_precision(llama, tokens):
    with torch.no_grad():
        llama.lm_head.weight *= 1e-4
    inputs = [{"input_ids": tokens}]
    expected = gradient_sums(llama, prunable_weights(llama), inputs)
    found = gradient_sums(llama.half(), prunable_weights(llama), inputs)
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=0.1, atol=float(total.max()) / 20)


# -- what is not computed ---------------------------------------------------------------------------------------------


def counting(layers):
    """Count the calls of `layers`, by name, without changing what they are."""
    counts = dict.fromkeys(layers, 0)

    def count(name):
        def hook(module, args):
            counts[name] += 1

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(count(name))
    return counts


@pytest.mark.parametrize("stops", [True, False])
def test_a_block_stops_when_its_last_input_is_seen_unless_someone_waits_for_its_outputs(llama, tokens, stops):
    mlp = llama.model.layers[0].mlp
    runner = next(stack_runners(llama, [{"input_ids": row[None]} for row in tokens]))
    weights = prunable_weights(llama, r".*layers\.0\..*(q|k|v|up|gate)_proj")
    if not stops:
        mlp.register_forward_hook(lambda *args: None)
    counts = counting({"gate": mlp.gate_proj, "act": mlp.act_fn, "down": mlp.down_proj})
    statistics = measure(llama, runner, 0, weights, ("inputs",))
    assert counts["gate"] == 6
    # The first batch tells what is called how often.
    assert counts["down"] == (1 if stops else 6)
    assert statistics.of("model.layers.0.mlp.up_proj").tokens == tokens.numel()


def test_a_layer_that_is_called_twice_is_seen_both_times(llama, tokens):
    mlp = llama.model.layers[0].mlp
    run = type(mlp).forward
    mlp.__class__ = type("Twice", (type(mlp),), {"forward": lambda self, x: run(self, run(self, x))})
    batches = [{"input_ids": row[None]} for row in tokens]
    assert_measures(measured(llama, batches), inputs_by_hooks(llama, batches))
    assert measured(llama, batches)["model.layers.0.mlp.up_proj"].tokens == 2 * tokens.numel()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "vit"])
def test_outputs_are_taken_from_the_run_and_are_those_of_the_weight_alone(family):
    model = tiny(family)
    batch = inputs_of(family)
    if family == "opt":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:2, -3:] = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    runner = next(stack_runners(model, [{name: rows[i : i + 2] for name, rows in batch.items()} for i in (0, 2, 4)]))
    weights = {name: w for name, w in prunable_weights(model).items() if name.startswith(f"{runner.names[0]}.")}
    statistics = measure(model, runner, 0, weights, ("inputs",))
    assert len(statistics.output_squares) == len(weights) - 1
    for name, found in statistics.output_squares.items():
        outputs = torch.cat(statistics.sample(name)) @ weights[name].matrix().T
        torch.testing.assert_close(found, outputs.square().sum(), rtol=1e-4, atol=1e-5)


# -- errors --------------------------------------------------------------------------------------------------------


def test_relative_errors_by_hand():
    lost, whole = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([25.0, 4.0, 0.0])
    assert relative_error(lost, whole).tolist() == pytest.approx([3 / 5, 0, 0])


def test_an_input_of_zeros_among_others_is_no_error(llama, tokens):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[3] = 0
    found = measured(llama, [{"input_ids": tokens}])
    assert found["model.layers.0.self_attn.q_proj"].input_norm[3] == 0
    prune(llama, 0.5, criterion="wanda", calibration=tokens)
    assert (llama.model.layers[0].self_attn.q_proj.weight[:, 3] == 0).all()


# -- inputs that are shared now and then -----------------------------------------------------------------------------


class Fickle(torch.nn.Module):
    """A block whose second layer is given the first one's inputs on one batch, and its own on another."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, hidden):
        return self.one(hidden) + self.two(hidden if hidden.shape[1] > 1 else hidden + 1)


class FickleModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Fickle()])

    def forward(self, hidden):
        return self.layers[0](hidden)


def test_layers_that_share_inputs_on_some_batches_alone_are_measured_on_their_own():
    batches = [{"hidden": torch.randn(1, size, 4)} for size in (2, 1)]
    model, found = FickleModel(), []
    prune(model, 0.5, criterion=lambda w, s: (found.append(s.input_norm), w.abs())[1], calibration=batches)
    rows = [batch["hidden"][0] for batch in batches]
    torch.testing.assert_close(found[0], torch.cat(rows).norm(dim=0))
    torch.testing.assert_close(found[1], torch.cat([rows[0], rows[1] + 1]).norm(dim=0))


class Twice(torch.nn.Module):
    """Calls its first layer on what its second layer gets, and on something else."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, hidden):
        return self.one(hidden) + self.two(hidden) + self.one(hidden.flip(0) + 1).mean(0)


def test_a_layer_that_is_called_once_more_has_inputs_of_its_own():
    model, found = FickleModel(), []
    model.layers = torch.nn.ModuleList([Twice()])
    hidden = torch.randn(2, 3, 4)
    prune(model, 0.5, [{"hidden": hidden}], criterion=lambda w, s: (found.append(s.input_norm), w.abs())[1])
    rows = hidden.flatten(0, 1)
    torch.testing.assert_close(sorted(found, key=lambda norm: float(norm.sum()))[0], rows.norm(dim=0))
    torch.testing.assert_close(found[0], torch.cat([rows, rows + 1]).norm(dim=0))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        OFTConfig(target_modules=["down_proj"], oft_block_size=4, init_weights=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_inputs_that_an_adapter_changes_are_those_of_its_base_layer(config, tokens):
    model = get_peft_model(tiny("llama"), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 3
    found = {}

    def keep(weight, statistics):
        found[len(found)] = statistics
        return weight.abs()

    weights = prunable_weights(model)
    expected = inputs_by_hooks(model, [{"input_ids": tokens}])
    prune(model, 0.0, tokens, criterion=keep)
    assert_measures(dict(zip(weights, found.values(), strict=True)), expected)


def test_hooks_on_parameters_wait_while_gradients_are_summed(llama, tokens):
    weights, calls = prunable_weights(llama), []
    expected = gradient_sums(llama, weights, [{"input_ids": tokens}])
    parameter = llama.model.layers[0].mlp.up_proj.weight

    def step(stepped):
        calls.append(stepped)
        stepped.data.zero_()

    parameter.register_hook(lambda gradient: gradient * 0)
    parameter.register_post_accumulate_grad_hook(step)
    found = gradient_sums(llama, weights, [{"input_ids": tokens}])
    assert all(torch.equal(found[name], expected[name]) for name in weights)
    assert not calls
    llama(input_ids=tokens, labels=tokens).loss.backward()
    assert len(calls) == 1
    assert not parameter.grad.any()

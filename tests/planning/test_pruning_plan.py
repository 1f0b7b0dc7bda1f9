import pytest
import torch
from torch import nn

from peft_sparse import plan_pruning
from peft_sparse.calibration.gradients import gradient_sums
from peft_sparse.calibration.inputs import as_inputs
from peft_sparse.calibration.measure import measure
from peft_sparse.calibration.runner import stack_runners
from peft_sparse.calibration.statistics import Statistics
from peft_sparse.model.blocks import find_blocks, prunable_weights
from peft_sparse.model.empty import empty_model
from peft_sparse.planning.simulation import LiveBytes
from peft_sparse.pruning.least_squares import masked_least_squares
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, select
from peft_sparse.pruning.refinement import find_refinement

from conftest import ENCODER_DECODERS, FAMILIES, VOCABULARY, tiny


SPEED = {"flops_per_second": 1e9}
# What a batch of a family is planned by: sequences of so many tokens.
FAMILIES_OF_TOKENS = [family for family in FAMILIES if family != "vit"]


def _state_bytes(batch):
    return sum(value.nbytes for link, value in batch.values.items() if link.leaf == 0)


def measured_bytes(model, calibration, needs):
    """The most that is kept between blocks, and what is measured for one block, over a whole run."""
    waiting, measured = 0, 0
    weights = prunable_weights(model)
    for runner in stack_runners(model, calibration):
        for index, block in enumerate(runner.names):
            waiting = max(waiting, sum(_state_bytes(batch) for batch in runner.batches))
            inside = {name: weight for name, weight in weights.items() if name.startswith(f"{block}.")}
            inputs = measure(model, runner, index, inside, needs).inputs.values()
            unique = {id(one): one for one in inputs}.values()
            tensors = [t for one in unique for t in (one.norm_squared, one.hessian, *one.rooms) if t is not None]
            measured = max(measured, sum(tensor.nbytes for tensor in tensors))
            runner.advance(index)
    return waiting, measured


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        *((family, "wanda") for family in FAMILIES_OF_TOKENS),
        *((family, "sparsegpt") for family in ("llama", "gpt2", "gpt_neox", "gpt_oss", "t5")),
    ],
)
def test_activations_are_counted_to_the_byte_and_statistics_from_above(family, criterion):
    model, tokens = tiny(family), torch.randint(0, VOCABULARY, (24, 12))
    planned = plan_pruning(model, 0.5, criterion=criterion, sequences=24, length=12, batch_size=7, **SPEED)
    needs = ("hessian",) if criterion == "sparsegpt" else ("inputs",)
    waiting, measured = measured_bytes(model, as_inputs(model, tokens, 7), needs)
    assert planned.activation_bytes == waiting
    if family in ("gpt2", "gpt_neox"):
        assert planned.statistics_bytes == measured, "each of its layers has its own inputs"
    else:
        assert measured < planned.statistics_bytes < 6 * measured


@pytest.mark.parametrize(("sequences", "batch_size"), [(30, 1), (30, 7), (130, 1), (130, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_counted_to_the_byte_for_many_tokens_and_any_dtype(sequences, batch_size, dtype):
    model, tokens = tiny("gpt2").to(dtype), torch.randint(0, VOCABULARY, (sequences, 50))
    planned = plan_pruning(
        model, 0.5, criterion="wanda", sequences=sequences, length=50, batch_size=batch_size, **SPEED
    )
    waiting, measured = measured_bytes(model, as_inputs(model, tokens, batch_size), ("inputs",))
    assert (planned.activation_bytes, planned.statistics_bytes) == (waiting, measured)


def test_an_image_model_is_planned_by_its_patches():
    model = tiny("vit")
    planned = plan_pruning(model, 0.5, criterion="wanda", sequences=6, length=5, batch_size=6, **SPEED)
    assert planned.activation_bytes == measured_bytes(model, [{"pixel_values": torch.randn(6, 3, 8, 8)}], ())[0]


def test_parameters_are_counted_to_the_byte(family):
    model = tiny(family)
    planned = plan_pruning(model, 0.5, **SPEED)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in find_blocks(model).values()]
    total = sum(p.nbytes for p in model.parameters())
    assert planned.model_bytes == total
    assert planned.block_bytes == max(blocks)
    assert planned.outside_bytes == total - sum(blocks)
    assert (planned.blocks, planned.weights) == (len(blocks), len(prunable_weights(model)))
    assert planned.activation_bytes == planned.statistics_bytes == planned.gradient_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_gradients_are_counted_with_the_largest_one(family, tokens):
    model = tiny(family)
    weights = prunable_weights(model)
    sums = gradient_sums(model, weights, [{"input_ids": tokens}])
    planned = plan_pruning(model, 0.5, criterion="gblm", sequences=6, length=12, **SPEED)
    largest = max(weight.storage.nbytes for weight in weights.values())
    assert planned.gradient_bytes == sum(total.nbytes for total in sums.values()) + largest


def test_the_widest_weight_decides_about_the_solver():
    """Its Hessian is larger than that of the largest weight."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.up, self.down = nn.Linear(8, 400, bias=False), nn.Linear(200, 8, bias=False)

    model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    solved = plan_pruning(model, 0.5, criterion="sparsegpt", sequences=1, length=1, **SPEED).working_bytes
    scored = plan_pruning(model, 0.5, criterion="wanda", sequences=1, length=1, **SPEED).working_bytes
    assert scored == 4 * 408 + 12 * 400 * 8
    assert solved == 4 * 408 + 12 * 200 * 8 + 4 * 200**2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_weights(family, tmp_path):
    model = tiny(family).to(torch.bfloat16 if family == "llama" else torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    options = {"criterion": "wanda", "sequences": 6, "length": 12} | SPEED
    expected = plan_pruning(model, "2:4", **options)
    config = type(model.config).from_pretrained(tmp_path)
    with torch.device("meta"):
        meta = type(model)(config).to(model.dtype)
    for described in (meta, config, tmp_path, str(tmp_path)):
        assert plan_pruning(described, "2:4", **options) == expected


def test_an_empty_model_has_names_and_shapes_and_no_memory(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    empty = empty_model(type(model.config).from_pretrained(tmp_path))
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())


def test_arguments_are_those_of_prune(llama):
    planned = plan_pruning(
        llama, {"q_proj": "2:4", "up_proj": 0.5}, criterion="ria", exclude_modules=["v_proj"], **SPEED
    )
    assert planned.weights == 6
    with pytest.raises(ValueError, match="'x_proj' in `pattern` matches no weight,"):
        plan_pruning(llama, {"x_proj": 0.5}, **SPEED)
    assert plan_pruning(tiny("gpt2"), 0.5, target_modules=["lm_head"], prune_tied=True, **SPEED).weights == 1


def test_memory_of_both_ways_of_pruning(llama):
    planned = {
        place: plan_pruning(llama, 0.5, criterion="wanda", activations=place, **SPEED)
        for place in ("device", "cpu", "disk")
    }
    beside = planned["cpu"].statistics_bytes + planned["cpu"].working_bytes
    for place, one in planned.items():
        waiting = 0 if place == "disk" else one.activation_bytes
        assert one.peak_bytes == one.model_bytes + waiting + beside
        assert one.streamed_bytes == one.outside_bytes + one.block_bytes + waiting + beside


def test_time_is_what_has_to_be_computed_at_the_speed_given(llama):
    options = {"sequences": 10, "length": 20}
    wanda, sparsegpt, gblm = (
        plan_pruning(llama, 0.5, criterion=name, **options, **SPEED) for name in ("wanda", "sparsegpt", "gblm")
    )
    entries = sum(weight.matrix().numel() for weight in prunable_weights(llama).values())
    # Two passes of 2 floating-point operations per weight and token, attention over half the tokens on average.
    assert wanda.flops == 2 * 2 * 10 * 20 * (entries + 3 * 20 * 16)
    assert wanda.flops < sparsegpt.flops
    assert gblm.flops == 5 / 2 * wanda.flops
    assert wanda.seconds == wanda.flops / 1e9
    one = plan_pruning(llama, 0.5, criterion="wanda", target_modules=["q_proj"], **options, **SPEED)
    assert one.flops == wanda.flops


def test_experts_take_the_time_of_those_that_a_token_goes_through():
    model = tiny("mixtral")
    planned = plan_pruning(model, 0.5, criterion="wanda", sequences=1, length=10, **SPEED)
    entries = sum(w.matrix().numel() * (1 if w.expert is None else 0.5) for w in prunable_weights(model).values())
    assert planned.flops == 2 * 2 * 10 * (entries + 2 * 10 * 16)


def test_the_speed_is_measured_unless_given(llama):
    planned = plan_pruning(llama, 0.5, criterion="wanda")
    assert 1e8 < planned.flops / planned.seconds < 1e15


def test_a_plan_is_printed(llama):
    text = str(plan_pruning(llama, 0.5, criterion="wanda", **SPEED))
    assert "21 weights in 3 blocks; model 0.00 GiB" in text
    assert "streamed from disk; about" in text


def test_both_sides_of_an_encoder_decoder_are_planned():
    for family in ENCODER_DECODERS:
        model = tiny(family)
        assert plan_pruning(model, 0.5, **SPEED).blocks == 4
        # A block of the decoder has cross attention besides.
        decoder = list(find_blocks(model).values())[2]
        assert plan_pruning(model, 0.5, **SPEED).block_bytes == sum(p.nbytes for p in decoder.parameters())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)])
@pytest.mark.parametrize("options", [{"refinement": "swap"}, {"refinement": "dsnot"}, {"update": True}], ids=str)
def test_refinement_and_update_are_counted_from_above(options, pattern):
    """Of one wide layer, whose working memory is all there is: its statistics and outputs are known."""
    torch.manual_seed(0)
    rows, columns = 200, 320
    weight, inputs = torch.randn(rows, columns), torch.randn(400, columns)
    hessian, mask = inputs.T @ inputs, select(weight.abs(), pattern, "row")
    known = Statistics(hessian.diagonal().sqrt(), hessian, None, 400, 4, inputs.mean(0), inputs.var(0))
    with LiveBytes([weight, mask, inputs, hessian, known.input_mean, known.input_variance]) as live:
        if options == {"update": True}:
            masked_least_squares(weight, mask, hessian)
        else:
            find_refinement(options["refinement"])[1].refine(weight, mask, known, pattern)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.LayerNorm(columns), nn.Linear(columns, rows))])})
    planned = plan_pruning(model, pattern, criterion="wanda", sequences=1, length=1, **options, **SPEED)
    bare = plan_pruning(model, pattern, criterion="wanda", sequences=1, length=1, **SPEED)
    assert live.peak < planned.working_bytes < 2 * live.peak
    assert planned.flops >= bare.flops


def test_what_refinement_and_update_measure_is_counted(llama):
    wanda = plan_pruning(llama, 0.5, criterion="wanda", sequences=10, length=20, **SPEED)
    for options, needs in (({"refinement": "dsnot"}, ("inputs", "moments")), ({"update": True}, ("hessian",))):
        planned = plan_pruning(llama, 0.5, criterion="wanda", sequences=10, length=20, **options, **SPEED)
        tokens = torch.randint(0, VOCABULARY, (10, 20))
        assert planned.statistics_bytes > wanda.statistics_bytes
        assert planned.statistics_bytes > measured_bytes(llama, as_inputs(llama, tokens, 1), needs)[1]
    magnitude = plan_pruning(llama, 0.5, refinement="swap", sequences=10, length=20, **SPEED)
    assert magnitude.activation_bytes == wanda.activation_bytes, (
        "a refinement needs calibration though its criterion does not"
    )
    assert magnitude.flops > wanda.flops
    with pytest.raises(ValueError, match="its mask cannot be refined afterwards"):
        plan_pruning(llama, 0.5, criterion="sparsegpt", refinement="swap", **SPEED)


def test_an_allocation_that_measures_is_planned_with_its_pass(llama):
    options = {"sequences": 6, "length": 12} | SPEED
    plain, measured = (plan_pruning(llama, 0.5, allocation=name, **options) for name in ("erk", "owl"))
    calibrated = plan_pruning(llama, 0.5, criterion="wanda", **options)
    assert (plain.activation_bytes, plain.statistics_bytes) == (0, 0)
    assert measured.activation_bytes == calibrated.activation_bytes
    assert measured.statistics_bytes == calibrated.statistics_bytes
    assert measured.flops == calibrated.flops / 2

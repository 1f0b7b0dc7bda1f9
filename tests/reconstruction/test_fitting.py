"""How a region is fitted: its optimum, steps and batches, losses, what is trained, and what is undone."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import OPTConfig, OPTForCausalLM

from peft_sparse import LeastSquares, MaskLoRAConfig, ScaledLoRAConfig, prune, sparsity
from peft_sparse.reconstruction import Fit, Step
from peft_sparse.reconstruction.fitting import TrainableRegion, region_loss
from peft_sparse.reconstruction.observer import LossOnBar
from peft_sparse.reconstruction.regions import Region

from checks import assert_same_weights, assert_same_zeros, zeros_of
from conftest import SIZES
from rebuilding import TUNERS, Told, assert_close_weights, batches_of, errors_by_definition, lively, rebuild


def test_a_linear_region_reaches_the_masked_least_squares_optimum():
    """By gradient steps; `region="matrix"` gets there at once."""
    layer, X = torch.nn.Linear(12, 6, bias=False).double(), torch.randn(40, 12).double()
    target, mask = layer(X).detach(), layer.weight.detach().abs() > layer.weight.detach().abs().median()
    with torch.no_grad():
        layer.weight.mul_(mask)
    optimizer = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    trained(layer, lambda index: (X, target, None), [0], {layer.weight: mask}, optimizer=optimizer, max_steps=400)
    for row, kept in enumerate(mask):
        best = torch.linalg.lstsq(X[:, kept], target[:, row]).solution
        torch.testing.assert_close(layer.weight[row, kept], best)
    assert (layer.weight[~mask] == 0).all()


# -- steps and batches ------------------------------------------------------------------------------------------------


def trained(layer, pair, batches, masks=None, number=0, on_step=None, **options):
    """Fit a layer as a region, by SGD at a constant rate unless told otherwise; return the number of steps."""
    defaults = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1),
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }
    region = TrainableRegion(Region("r", 0, {}), list(layer.parameters()), masks or {}, lambda: None, lambda: None)
    return region.train(lambda index, inputs: layer(inputs), pair, batches, Fit(**defaults | options), number, on_step)


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

    steps = trained(
        layer,
        pair,
        list(range(10, 10 + count)),
        on_step=told.append,
        optimizer=lambda parameters: Spy(parameters, 0.1),
        epochs=epochs,
        max_steps=max_steps,
        gradient_accumulation_steps=accumulation,
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
    told = Told()
    report = rebuild(
        lively("llama"),
        torch.cat([batch["input_ids"] for batch in batches_of("llama", 5, 1)]),
        gradient_accumulation_steps=2,
        holdout=holdout,
        observer=told,
        **options,
    )
    steps = options["max_steps"] or 2 * (3 if holdout == 0 else 2)
    assert told.promised == [steps]
    assert [region.steps for region in report.regions] == [steps] * 6
    assert [(step.region, step.number) for step in told.steps] == [
        (region.name, number + 1) for region in report.regions for number in range(steps)
    ]
    assert tuple(told.regions) == report.regions


def test_the_order_is_drawn_from_the_seed_and_nothing_else():
    def order(seed, number):
        torch.rand(3)
        drawn, layer = [], torch.nn.Linear(1, 1)

        def pair(index):
            drawn.append(index)
            return torch.ones(1, 1, 1), torch.ones(1, 1, 1), None

        trained(layer, pair, list(range(8)), number=number, seed=seed, epochs=2)
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
    # Without a tolerance, so that the solver does not stop at different distances from the same solution.
    options = SGD if region == "submodule" else {"update": LeastSquares(tolerance=0)}
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
    told = Told()
    report = rebuild(lively("llama"), batches_of("llama"), loss=loss, epochs=6, max_steps=None, observer=told)
    assert all(region.error < region.error_pruned for region in report.regions)
    first = [float(step.loss) for step in told.steps if step.region == report.regions[0].name]
    assert 0 < first[-1] < first[0]
    assert report.loss == loss


@pytest.mark.parametrize(
    ("share", "batches", "held"), [(0, 5, 0), (0.1, 5, 1), (0.1, 1, 0), (0.9, 3, 2), (0.14, 50, 7)]
)
def test_the_last_batches_are_held_out(share, batches, held):
    train, held_out = Fit(holdout=share).split(batches)
    assert train == list(range(batches - held))
    assert held_out == (list(range(batches - held, batches)) or train)


def test_held_out_sequences_are_not_trained_on():
    """Other tokens in their place give the same weights, since magnitude looks at no input."""
    calibration = batches_of("llama", 4)
    others = [*calibration[:3], {"input_ids": (calibration[3]["input_ids"] + 1) % 61}]
    models, options = (lively("llama"), lively("llama")), {"holdout": 0.25, "learning_rate": 1e-3}
    reports = [rebuild(model, c, **options) for model, c in zip(models, (calibration, others), strict=True)]
    assert not any(region.reverted for report in reports for region in report.regions)
    assert_same_weights(*models)
    assert reports[0].regions[0].error != reports[1].regions[0].error


class Bar:
    """A progress bar that is shown."""

    disable = False

    def __init__(self):
        self.shown = []

    def set_postfix(self, **values):
        self.shown.append(values)


def test_the_progress_bar_tells_region_and_loss_and_seldom_asks_the_device():
    bar, told = Bar(), []
    on_step = LossOnBar(bar, told.append)
    steps = [Step("layers.0", number, 3, torch.tensor(0.12345), 1e-3) for number in (1, 2, 3)]
    for step in steps:
        on_step(step)
    assert bar.shown == [{"region": "layers.0", "loss": "0.123"}]
    assert told == steps
    hidden = Bar()
    hidden.disable = True
    LossOnBar(hidden, told.append)(steps[0])
    assert hidden.shown == []
    assert told == [*steps, steps[0]]


# -- training ends where it should ------------------------------------------------------------------------------------


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


def test_half_precision_is_kept_and_trained_in_full():
    # Gemma's norms may be in another precision than its states.
    model, calibration, dtypes = lively("gemma3").bfloat16(), batches_of("gemma3"), []
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

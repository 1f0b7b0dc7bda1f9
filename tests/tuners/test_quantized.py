"""Adapters on quantised bases: on those that can be dequantised, and on those that cannot.

Each base is a pruned tiny Llama that Transformers quantises while loading it, as users do.
"""

import gc
import importlib.util
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from transformers import AutoModelForCausalLM

import peft_sparse.tuners.base_weight
import peft_sparse.tuners.model
import peft_sparse.tuners.proof
from peft_sparse import MaskLoRAConfig, ScaledLoRAConfig, SparseTrainer, SparseTrainingArguments, prune
from peft_sparse.tuners.functional import effective_weight
from peft_sparse.tuners.layer import SparseLoraLayer

from checks import layers_of, train_some
from conftest import VOCABULARY


pytestmark = [
    # On CPUs bitsandbytes multiplies int8 in bfloat16, and says so.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

# Multiples of 64, the block of NF4 and FP4: bitsandbytes' fast CPU kernel takes no others.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"mask": MaskLoRAConfig, "scaled": ScaledLoRAConfig}


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises this base, is not installed")
    return transformers.BitsAndBytesConfig(**options)


def bnb_4bit(**options):
    return bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


def torchao(name, **options):
    pytest.importorskip("torchao", reason="torchao, which quantises this base, is not installed")
    import torchao.quantization as quantization

    options = {key: value(quantization) if callable(value) else value for key, value in options.items()}
    return transformers.TorchAoConfig(getattr(quantization, name)(**options))


SCHEMES = {
    "nf4": lambda: bnb_4bit(bnb_4bit_quant_type="nf4"),
    "nf4-double": lambda: bnb_4bit(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: bnb_4bit(bnb_4bit_quant_type="fp4"),
    "bnb-int8": lambda: bitsandbytes(load_in_8bit=True),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    # The layout for any device: `Int4WeightOnlyConfig` runs on accelerators only.
    "torchao-int4": lambda: torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda module: module.PerGroup(32)
    ),
}


def config(cls, **kwargs):
    return cls(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False} | kwargs)


def adapted(model, config):
    """`get_peft_model` leaves new layers in training mode."""
    return get_peft_model(model, config).eval()


def new_llama():
    sizes = SIZES | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def original():
    """The pruned model before it is quantised."""
    model = new_llama()
    prune(model, 0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("pruned")
    original.save_pretrained(path)
    return path


@pytest.fixture(params=SCHEMES)
def quantised(request, checkpoint):
    """A function that quantises the pruned model, the same way whenever it is called."""

    def load(path=checkpoint, dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=SCHEMES[request.param](), dtype=dtype, device_map="cpu"
        ).eval()

    # Skips where what quantises is not installed.
    SCHEMES[request.param]()
    return load


@pytest.fixture(params=CONFIGS)
def cls(request):
    return CONFIGS[request.param]


def weights(model):
    """The dequantised weights below the adapters, by name."""
    return {
        name: module.get_base_weight().clone()
        for name, module in layers_of(model).items()
        if isinstance(module, SparseLoraLayer)
    }


def codes(model):
    """All that a quantised weight is stored as: codes and scales, by name."""
    found = {}
    for name, module in layers_of(model).items():
        layer = module.get_base_layer()
        weight = layer.weight
        if hasattr(weight, "quant_state"):
            found[f"{name}.codes"] = weight.data
            for key, value in weight.quant_state.as_dict(packed=False).items():
                found[f"{name}.{key}"] = value
        elif hasattr(layer, "state"):
            found[f"{name}.codes"] = weight.data
            found[f"{name}.scale"] = weight.SCB if layer.state.SCB is None else layer.state.SCB
        else:
            for key in weight.__tensor_flatten__()[0]:
                found[f"{name}.{key}"] = getattr(weight, key)
    assert found
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def assert_same_codes(model, expected):
    found = codes(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key


def assert_pruned_zeros(model, original):
    """Whatever was pruned before the quantisation is exactly zero."""
    pruned = {name: layer.weight == 0 for name, layer in layers_of(original).items()}
    found = weights(model)
    assert found.keys() == pruned.keys()
    for name, zeros in pruned.items():
        assert zeros.float().mean() == pytest.approx(0.5, abs=0.01)
        assert (found[name][zeros] == 0).all(), name
        assert (found[name] != 0).float().mean() > 0.3, name


@torch.no_grad()
def relative_error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# -- bases whose zeros can be seen ------------------------------------------------------------------------------------


def test_a_fresh_adapter_on_a_quantised_base_is_the_identity(quantised, cls, tokens):
    expected = quantised()(tokens).logits
    fresh = adapted(quantised(), config(cls, init_weights=True))
    # Not bit for bit: bitsandbytes rounds activations too, where the adapter multiplies by the dequantised weight.
    assert relative_error(fresh(tokens).logits, expected) < 0.02


@pytest.mark.parametrize(("cls", "dropout"), [(MaskLoRAConfig, 0.1), (ScaledLoRAConfig, 0.0)])
def test_training_lowers_the_loss_and_leaves_the_codes(quantised, cls, tokens, dropout, original):
    wrapped = adapted(quantised(), config(cls, lora_dropout=dropout, init_weights=True))
    assert all(module.quantization_backend is not None for module in layers_of(wrapped).values())
    before = codes(wrapped)
    loss = wrapped(input_ids=tokens, labels=tokens).loss
    train_some(wrapped, tokens, steps=5)
    assert wrapped(input_ids=tokens, labels=tokens).loss < loss
    assert_same_codes(wrapped, before)
    assert_pruned_zeros(wrapped, original)


def test_gradients_are_those_of_the_dequantised_weight(quantised, cls):
    wrapped = adapted(quantised(), config(cls))
    layer = wrapped.base_model.model.model.layers[0].mlp.up_proj
    A, B = layer.A["default"].weight, layer.B["default"].weight
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, A, B])
    W, factor = layer.get_base_weight(), layer.factor
    s = layer.scaling["default"]
    H = (W != 0).to(W.dtype) if factor == "mask" else W
    effective = (W if layer.residual["default"] else (1 - s) * W) + s * H * (B @ A)
    plain = F.linear(x, effective)
    torch.testing.assert_close(y, plain)
    for found, wanted in zip(gradients, torch.autograd.grad(plain.square().sum(), [x, A, B]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_dequantised_weight_is_kept_for_backward(quantised, cls, tokens, dropout, monkeypatch, request):
    wrapped = adapted(quantised(), config(cls, lora_dropout=dropout)).train()
    shapes = {tuple(weight.shape) for weight in weights(wrapped).values()}
    dequantised, kept = [], []
    for backend in {type(module.quantization_backend) for module in layers_of(wrapped).values()}:
        monkeypatch.setattr(backend, "get_base_weight", watched(backend.get_base_weight, dequantised))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
    wide = [t for t in kept if type(t) is torch.Tensor and t.is_floating_point()]
    assert wide
    # Under dropout the base layer multiplies by itself, and torchao's keeps what it dequantised.
    if not (dropout and "torchao" in request.node.callspec.id):
        assert not [t.shape for t in wide if tuple(t.shape) in shapes or tuple(t.shape[::-1]) in shapes]
    kept.clear()
    wide.clear()
    gc.collect()
    assert dequantised
    assert all(reference() is None for reference in dequantised)
    loss.backward()
    assert len(dequantised) > len(shapes)


def watched(function, seen):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        seen.append(weakref.ref(result))
        return result

    return call


def test_merging_keeps_every_zero_and_the_function_within_the_quantisation_error(quantised, cls, tokens, original):
    wrapped = adapted(quantised(), config(cls, lora_alpha=2 if cls is MaskLoRAConfig else None))
    train_some(wrapped, tokens)
    rounding = {
        name: relative_error(weight, layers_of(original)[name].weight) for name, weight in weights(wrapped).items()
    }
    targets = {}
    for name, layer in layers_of(wrapped).items():
        A, B = layer.A["default"].weight, layer.B["default"].weight
        s = layer.scaling["default"]
        c = 1 if layer.residual["default"] else 1 - s
        with torch.no_grad():
            targets[name] = effective_weight(layer.get_base_weight(), A, B, layer.factor, c, s)
    trained = wrapped(tokens).logits
    moved = relative_error(quantised()(tokens).logits, original(tokens).logits)
    wrapped.merge_adapter(safe_merge=True)
    assert_pruned_zeros(wrapped, original)
    for name, weight in weights(wrapped).items():
        assert relative_error(weight, targets[name]) < 2 * rounding[name] + 1e-3, name
    assert relative_error(wrapped(tokens).logits, trained) < 2 * moved + 0.02
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    assert not any(isinstance(module, SparseLoraLayer) for module in merged.modules())
    assert relative_error(merged(tokens).logits, trained) < 2 * moved + 0.02


def test_unmerging_restores_the_very_codes(quantised, cls, tokens):
    wrapped = adapted(quantised(), config(cls))
    before, expected = codes(wrapped), wrapped(tokens).logits
    for _ in range(2):
        wrapped.merge_adapter()
        assert any(
            isinstance(value, torch.Tensor) and not torch.equal(value, before[key])
            for key, value in codes(wrapped).items()
        )
        wrapped(tokens)
        wrapped.unmerge_adapter()
        assert_same_codes(wrapped, before)
        assert torch.equal(wrapped(tokens).logits, expected)
    # What the base layer computes by itself is restored too.
    with torch.no_grad(), wrapped.disable_adapter():
        found = wrapped(tokens).logits
        assert relative_error(found, quantised()(tokens).logits) < 0.02


def test_an_adapter_is_loaded_onto_the_same_quantised_base_and_refused_by_another(quantised, cls, tokens, tmp_path):
    wrapped = adapted(quantised(), config(cls))
    train_some(wrapped, tokens)
    proofs = []
    for state in ("new", "used", "merged", "unmerged"):
        if state == "used":
            wrapped(tokens)
        if state == "merged":
            wrapped.merge_adapter()
        if state == "unmerged":
            wrapped.unmerge_adapter()
        wrapped.save_pretrained(tmp_path / state)
        proofs.append(PeftConfig.from_pretrained(tmp_path / state).mask_fingerprints)
    assert len(proofs[0]) == 14
    assert all(proof == proofs[0] for proof in proofs)
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "unmerged")
    torch.testing.assert_close(loaded(tokens).logits, wrapped(tokens).logits)
    other = new_llama()
    prune(other, 0.7)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on other zeros .* 14 of 14 layers"):
        PeftModel.from_pretrained(quantised(tmp_path / "other"), tmp_path / "unmerged")


@pytest.mark.parametrize("quantised", ["nf4", "bnb-int8"], indirect=True)
def test_a_trainer_that_is_to_prune_a_quantised_base_says_what_to_do(quantised, tokens, tmp_path):
    args = SparseTrainingArguments(str(tmp_path), sparsity=0.6, max_steps=1, use_cpu=True, report_to="none")
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = SparseTrainer(adapted(quantised(), config(MaskLoRAConfig)), args, train_dataset=data)
    with pytest.raises(ValueError, match="is quantised .* Prune the model before it is quantised"):
        trainer.train()


# PEFT's preparation makes norms, and with them the inputs of quantised layers, float32.
@pytest.mark.parametrize(
    ("cls", "prepared", "dropout"),
    [
        (MaskLoRAConfig, True, 0.1),
        (ScaledLoRAConfig, True, 0.0),
        (MaskLoRAConfig, False, 0.0),
        (ScaledLoRAConfig, False, 0.1),
    ],
)
def test_a_half_precision_quantised_base_trains(quantised, cls, prepared, dropout, tokens, original):
    base = quantised(dtype=torch.bfloat16)
    if prepared:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    wrapped = adapted(base, config(cls, lora_dropout=dropout, init_weights=True))
    assert prepared or wrapped(tokens).logits.dtype == torch.bfloat16
    loss = wrapped(input_ids=tokens, labels=tokens).loss
    train_some(wrapped, tokens, steps=5)
    assert wrapped(input_ids=tokens, labels=tokens).loss < loss
    assert_pruned_zeros(wrapped, original)


# On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in place when it first runs in evaluation without
# gradients, and dequantises what it repacked to noise. Of the same kind:
# https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078
# Its 8-bit layers move their scales when they first run. torchao's layers change nothing.
REPACKING = pytest.mark.parametrize("quantised", ["nf4", "nf4-double", "fp4", "bnb-int8"], indirect=True)


@REPACKING
def test_a_base_that_ran_before_it_was_adapted_is_still_read_right(quantised, cls, tokens, original, tmp_path):
    fresh = adapted(quantised(), config(cls))
    fresh.save_pretrained(tmp_path)
    base = quantised()
    with torch.no_grad():
        base(tokens)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_pruned_zeros(loaded, original)
    assert relative_error(loaded(tokens).logits, fresh(tokens).logits) < 0.02


@REPACKING
def test_running_the_base_alone_in_between_leaves_the_adapter_working(quantised, cls, tokens, original):
    wrapped = adapted(quantised(), config(cls))
    expected = wrapped(tokens).logits
    with torch.no_grad(), wrapped.disable_adapter():
        wrapped(tokens)
    assert_pruned_zeros(wrapped, original)
    assert wrapped(tokens).logits.dtype == expected.dtype
    assert relative_error(wrapped(tokens).logits, expected) < 0.02
    wrapped.merge_adapter()
    with torch.no_grad():
        wrapped(tokens)
    assert_pruned_zeros(wrapped, original)
    wrapped.unmerge_adapter()
    assert relative_error(wrapped(tokens).logits, expected) < 0.02


def test_two_adapters_on_a_quantised_base_each_keep_their_function(quantised, cls, tokens):
    wrapped = adapted(quantised(), config(cls))
    first = wrapped(tokens).logits
    wrapped.add_adapter("other", config(cls, r=2))
    wrapped.set_adapter("other")
    second = wrapped(tokens).logits
    assert relative_error(second, first) > 0.05
    mixed = wrapped(tokens, adapter_names=["default", "other"] * 3).logits
    # bitsandbytes picks the scale of int8 activations per call.
    torch.testing.assert_close(mixed[::2], first[::2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1::2], second[1::2], rtol=1e-3, atol=1e-3)


# -- bases that cannot be dequantised ---------------------------------------------------------------------------------


class Kernel(torch.nn.Module):
    """A linear layer whose weight nobody but its forward reads."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # PEFT asks this one for the device.
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.bias = None

    def forward(self, x):
        return F.linear(x, self.qweight)


def unreadable(monkeypatch, path):
    """The pruned model with kernels for layers, which PEFT's backends are made to call GPTQ."""

    def resolve(layer, **kwargs) -> QuantizationBackend | None:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Kernel) else None

    for module in (peft_sparse.tuners.base_weight, peft_sparse.tuners.model, peft_sparse.tuners.proof):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    # PEFT's own count of features knows GPTQ layers by their class.
    monkeypatch.setattr(
        peft_sparse.tuners.base_weight,
        "_get_in_out_features",
        lambda layer: (layer.in_features, layer.out_features),
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, layer in layers_of(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Kernel(layer))
    return model.eval()


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_masklora_works_by_its_saved_mask_where_no_weight_can_be_read(
    checkpoint, tokens, tmp_path, monkeypatch, dropout
):
    readable = AutoModelForCausalLM.from_pretrained(checkpoint)
    wrapped = adapted(readable, config(MaskLoRAConfig, target_modules=TARGETS, save_mask=True, lora_dropout=dropout))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(unreadable(monkeypatch, checkpoint), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(loaded(tokens).logits, wrapped(tokens).logits)
    loss = loaded(input_ids=tokens, labels=tokens).loss
    train_some(loaded, tokens)
    assert loaded(input_ids=tokens, labels=tokens).loss < loss
    with pytest.raises(TypeError, match="gptq layers"):
        loaded.merge_adapter()
    # Saved again, it still carries the mask, and serves bases that can be read, pruned or not.
    loaded.save_pretrained(tmp_path / "again")
    for base in (AutoModelForCausalLM.from_pretrained(checkpoint), new_llama()):
        again = PeftModel.from_pretrained(base, tmp_path / "again")
        torch.testing.assert_close(again(tokens).logits, loaded(tokens).logits)


def test_a_saved_mask_serves_half_precision_activations_and_is_not_kept_for_backward(
    checkpoint, tokens, tmp_path, monkeypatch
):
    readable = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted(readable, config(MaskLoRAConfig, target_modules=TARGETS, save_mask=True)).save_pretrained(tmp_path)
    base = unreadable(monkeypatch, checkpoint).to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    # The first pass settles what was loaded.
    assert loaded(tokens).logits.dtype == torch.bfloat16
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = loaded(input_ids=tokens, labels=tokens).loss
    shapes = {tuple(layer.weight.shape) for layer in layers_of(readable).values()}
    weights = {layer.qweight.data_ptr() for layer in base.modules() if isinstance(layer, Kernel)}
    assert not [t.shape for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in weights]
    loss.backward()


def test_two_saved_masks_are_each_their_adapters_own(checkpoint, tokens, tmp_path, monkeypatch):
    for name, sparsity in (("first", 0.5), ("second", 0.8)):
        model = new_llama()
        prune(model, sparsity)
        adapted(model, config(MaskLoRAConfig, target_modules=TARGETS, save_mask=True)).save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(unreadable(monkeypatch, checkpoint), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    alone = PeftModel.from_pretrained(unreadable(monkeypatch, checkpoint), tmp_path / "second")
    torch.testing.assert_close(loaded(tokens).logits, alone(tokens).logits)


def test_lora_prune_needs_no_mask_to_train_where_no_weight_can_be_read(checkpoint, tokens, monkeypatch):
    wrapped = adapted(
        unreadable(monkeypatch, checkpoint), config(MaskLoRAConfig, target_modules=TARGETS, masking="merge")
    )
    loss = wrapped(input_ids=tokens, labels=tokens).loss
    train_some(wrapped, tokens)
    assert wrapped(input_ids=tokens, labels=tokens).loss < loss


NO_ZEROS = (
    "weights of gptq layers cannot be read.* Use a MaskLoRA adapter saved with `save_mask=True`, or another base"
)


def test_without_a_saved_mask_an_unreadable_base_is_refused(checkpoint, cls, tokens, monkeypatch):
    wrapped = adapted(unreadable(monkeypatch, checkpoint), config(cls, target_modules=TARGETS))
    with pytest.raises(TypeError, match=NO_ZEROS):
        wrapped(tokens)


def test_a_saved_mask_does_not_help_scaledlora(checkpoint, tokens, tmp_path, monkeypatch):
    readable = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted(readable, config(ScaledLoRAConfig, target_modules=TARGETS, save_mask=True)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(unreadable(monkeypatch, checkpoint), tmp_path)
    with pytest.raises(TypeError, match=NO_ZEROS):
        loaded(tokens)


def test_a_new_adapter_cannot_read_the_mask_it_is_to_save(checkpoint, tokens, monkeypatch):
    wrapped = adapted(
        unreadable(monkeypatch, checkpoint), config(MaskLoRAConfig, target_modules=TARGETS, save_mask=True)
    )
    # An empty mask would train nothing, silently.
    with pytest.raises(TypeError, match=NO_ZEROS):
        wrapped(tokens)


# -- bases that cannot be made here -----------------------------------------------------------------------------------

ELSEWHERE = {"gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq"}


@pytest.mark.parametrize("scheme", ELSEWHERE)
def test_bases_of_other_packages(scheme):
    package = ELSEWHERE[scheme]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{scheme} layers come from {package}, which is not installed")
    pytest.skip(f"{scheme} layers of {package} need a CUDA device, and are not tested yet")

"""Every refusal in the package, with its words; the last test finds a `raise` that no case reaches."""

import ast
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, MambaConfig, TrainingArguments

import peft_sparse
from peft_sparse import (
    Criterion,
    CubicSchedule,
    FreezingCallback,
    Magnitude,
    MaskLoRAConfig,
    PruningCallback,
    PruningCycles,
    ScaledLoRAConfig,
    SparseGPT,
    SparseTrainer,
    SparseTrainingArguments,
    compact,
    pack_sequences,
    perplexity,
    plan_pruning,
    plan_training,
    prune,
    prune_checkpoint,
    prune_structured,
    reconstruct,
    sample_sequences,
)
from peft_sparse.model import processes
from peft_sparse.model.weights import WeightView, as_matrix
from peft_sparse.pruning import checkpoint as streaming
from peft_sparse.pruning.allocation import allocate
from peft_sparse.pruning.choices import chosen
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.pruning.least_squares import masked_least_squares
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, parse_pattern
from peft_sparse.pruning.refinement import find_refinement
from peft_sparse.pruning.report import PruningReport
from peft_sparse.pruning.sparsegpt import sparsegpt
from peft_sparse.reconstruction.progress import Progress
from peft_sparse.structured import saving
from peft_sparse.structured.saving import CompactConfig
from peft_sparse.training.distillation import check_teacher, hidden_states_loss, logits_loss, predictions
from peft_sparse.training.learning_rates import norm_drop, retraining_schedule
from peft_sparse.training.zero_guard import ZeroGuardCallback, _compare
from peft_sparse.tuners import MaskLoraModel, merged_state_dict
from peft_sparse.tuners.proof import check_masks
from peft_sparse.tuners.registration import register

from conftest import CONFIGS, tiny
from rebuilding import rebuild as rebuilt
from trainers import StopAt


TOKENS = torch.randint(0, 61, (4, 8))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whoever makes a folder makes it there."""
    monkeypatch.chdir(tmp_path)


def llama(edit=None):
    model = tiny("llama")
    if edit is not None:
        with torch.no_grad():
            edit(model)
    return model


def nan_weight(model):
    model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan


def nan_norm(model):
    model.model.layers[1].input_layernorm.weight.fill_(torch.nan)


def integer_parameters():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    return model


def merged():
    model = get_peft_model(llama(), MaskLoRAConfig(target_modules="all-linear"))
    model.merge_adapter()
    return model


def zero_norm(model):
    model.model.layers[1].input_layernorm.weight.zero_()


def nan_head(model):
    model.lm_head.weight[0, 0] = torch.nan


class Fickle(nn.Module):
    """A block whose second layer is given the first one's inputs on one batch, and its own on another."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden):
        return self.one(hidden) + self.two(hidden if hidden.shape[1] > 1 else hidden + 1)


class FickleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Fickle()])

    def forward(self, hidden):
        return self.layers[0](hidden)


def fickle():
    batches = [{"hidden": torch.randn(1, size, 4)} for size in (2, 1)]
    prune(FickleModel(), 0.5, criterion="wanda", calibration=batches)


def grouped_convolution():
    model = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))]))
    model.forward = lambda pixels: model[0][0](pixels)
    prune(model, 0.5, criterion="wanda", calibration=[{"pixels": torch.randn(1, 4, 5, 5)}])


def headless_gradients():
    prune(AutoModel.from_config(CONFIGS["llama"]), 0.5, criterion="gblm", calibration=TOKENS)


def no_norms():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])})
    plan_pruning(model, 0.5, criterion="wanda", flops_per_second=1)


def wanda(model, pattern=0.5, **options):
    return prune(model, pattern, criterion="wanda", **({"calibration": TOKENS} | options))


def streamed(model=None, edit=None, original=False, **options):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        (model or llama()).save_pretrained(source, save_original_format=original)
        if edit is not None:
            edit(Path(folder))
        prune_checkpoint(source, Path(folder) / "pruned", 0.5, **options)


def streamed_by_two():
    with mock.patch.object(streaming, "PartialState", return_value=SimpleNamespace(num_processes=2)):
        streamed()


def beside(other, failure=None):
    """Prune as process 0 of two, of which the other says `other` where all tell what they do, or that it failed."""
    with (
        mock.patch.object(processes, "place", return_value=(0, 2)),
        mock.patch.object(processes, "_gathered", side_effect=lambda own: [own, (other, failure)]),
    ):
        wanda(llama())


def occupy(folder):
    (folder / "pruned").mkdir()
    (folder / "pruned" / "something").touch()


def remove_weights(folder):
    (folder / "source" / "model.safetensors").unlink()


def forget_the_class(folder):
    LlamaConfig().save_pretrained(folder / "source")


def allocated(method, share=0.5, **options):
    """Two weights of 16 entries, one of them with 4 zeros."""
    layers = {name: nn.Linear(4, 4) for name in ("one", "two")}
    layers["one"].weight.data[0] = 0
    return allocate(method, {name: WeightView(layer) for name, layer in layers.items()}, share, blocks={}, **options)


def unpicturable():
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        PruningReport("magnitude", "0.5", "row", 0.5, 1.0, 1, ()).plot("unused")


def rebuild(model=None, **options):
    return rebuilt(model or llama(), TOKENS, **{"max_steps": 2} | options)


def post_norm():
    model = tiny("bart")
    with torch.no_grad():
        # Two fresh norms in a row are one.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def shallow():
    model = llama()
    del model.model.layers[2]
    return model


def other_state():
    with tempfile.TemporaryDirectory() as folder:
        Progress(folder, {"data": "these"})
        Progress(folder, {"data": "those"})


def other_region():
    with tempfile.TemporaryDirectory() as folder:
        Progress(folder, {}).save(0, {}, {}, as_read="these weights")
        Progress(folder, {}).load(0, as_read="those weights")


def reconstructed_by_trainer(**resuming):
    options = {"recovery": "reconstruct", "sparsity": 0.5, "calibration_samples": 2, "save_strategy": "no"}
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    SparseTrainer(llama(), arguments(**options), train_dataset=data, callbacks=[StopAt(1)]).train(**resuming)


def flattened():
    model = llama()
    model.model.layers[0] = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(model.model.layers[0])
    ZeroGuardCallback().on_train_begin(arguments(), _State(), None, model=model)


def flattening_trainer():
    plugin = SimpleNamespace(fsdp_version=1, activation_checkpointing=False)
    with mock.patch.object(AcceleratorState, "fsdp_plugin", plugin, create=True):
        SparseTrainer(llama(), arguments())


class TwoTowers(torch.nn.Module):
    """Of which no input comes to the second."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (
            torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))]) for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        return self.one[0](x)


class Stairs(torch.nn.Module):
    """Does something between its blocks."""

    def __init__(self, in_place):
        super().__init__()
        self.steps = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
        self.in_place = in_place

    def forward(self, x):
        for step in self.steps:
            x = step(x)
            x = x.add_(1) if self.in_place else x + 1
        return x


def changed_of_mind():
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = SparseTrainer(llama(), arguments(sparsity=0.5, max_steps=1, save_strategy="no"), train_dataset=data)
    trainer.args.sparsity = 0.6
    trainer.train()


def nan_hessian():
    masked_least_squares(torch.ones(2, 2), torch.eye(2).bool(), torch.full((2, 2), torch.nan))


def words(text, **options):
    return {"input_ids": text.split()}


def unused_layer(model):
    model.model.layers[0].idle = nn.Linear(4, 4)


def adapted(model=None, **options):
    return get_peft_model(model or llama(), MaskLoRAConfig(target_modules="all-linear", **options)).eval()


def headless():
    return AutoModel.from_config(CONFIGS["llama"])


def unreadable():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.quantization_backend = ForwardOnlyQuantizationBackend("stub")
    model(TOKENS)


def foreign_mask():
    one = nn.Sequential(nn.Linear(4, 4))
    one[0].weight.data = 1.0 - torch.eye(4)
    model = get_peft_model(one, MaskLoRAConfig(target_modules=["0"], save_mask=True, mask_fingerprints={"0": ""}))
    model.base_model.model[0].saved_masks["default"].fill_(255)
    model(torch.ones(1, 4))


def experts(**options):
    return get_peft_model(
        tiny("mixtral"), MaskLoRAConfig(target_modules=[], target_parameters=["gate_up_proj"], **options)
    )


def other_parameters():
    experts().add_adapter("other", MaskLoRAConfig(target_modules=[], target_parameters=["down_proj"]))


def mamba():
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    get_peft_model(AutoModelForCausalLM.from_config(config), MaskLoRAConfig(target_modules=["out_proj"]))


def vector_parameter():
    get_peft_model(llama(), MaskLoRAConfig(target_modules=[], target_parameters=["input_layernorm.weight"]))


def nan_adapter():
    model = get_peft_model(llama(), MaskLoRAConfig(target_modules="all-linear"))
    nn.init.constant_(model.base_model.model.model.layers[0].mlp.up_proj.mask_lora_B.default.weight, torch.nan)
    return model


def guarded_vandalism():
    model, guard = llama(), ZeroGuardCallback()
    prune(model, 0.5)
    model.requires_grad_(False)
    guard.on_train_begin(None, _State(), None, model=model)
    model.model.layers[2].mlp.up_proj.weight.add_(1)
    guard.check()


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def scheduled(method, original=(0.1, 0.1, 0.1), lr=0.1):
    return retraining_schedule(method, torch.optim.SGD([torch.zeros(1)], lr=lr), original, 3)


def cycles(model, step=0, **options):
    state = _State()
    state.global_step = step
    PruningCallback(0.5, schedule=PruningCycles(2)).on_train_begin(arguments(**options), state, None, model=model)


def prune_in_parts(model):
    next(model.parameters()).ds_tensor = torch.zeros(1)
    PruningCallback(0.5, criterion="wanda", calibration=torch.zeros(1, 2).long()).prune(model, 0)


def teacher_in_parts():
    teacher = llama()
    next(teacher.parameters()).ds_tensor = torch.zeros(1)
    check_teacher(teacher, llama(), "logits")


def two_gpus():
    args = arguments(distillation="logits")
    with mock.patch.object(SparseTrainingArguments, "n_gpu", 2):
        SparseTrainer(llama(), args, teacher=llama())


def half_pruned():
    model = llama()
    prune(model, 0.5)
    return model


def shared_teacher(model):
    SparseTrainer(model, arguments(distillation="logits"), teacher=model)


def freeze(model, sharded=False):
    args = SimpleNamespace(fsdp=["full_shard"] if sharded else [], deepspeed=None, world_size=1)
    FreezingCallback().on_train_begin(args, None, None, model=model)


class _State:
    stateful_callbacks: dict = {}
    log_history: tuple = ()
    global_step = 0
    max_steps = 6


class ForeignConfig:
    """Stands for another package's method of the same name."""


def arguments(**kwargs):
    return SparseTrainingArguments("unused", use_cpu=True, report_to="none", **kwargs)


def mismatch():
    config = MaskLoRAConfig(mask_fingerprints={"lm_head": "61x16:500:0000000000000000"})
    check_masks(llama(), config)


def flap(model=None, ratio=0.3, **options):
    return prune_structured(model or llama(), ratio, **{"calibration": TOKENS} | options)


def heads(edit):
    """Structured pruning of a model whose first attention is built otherwise."""
    model = llama()
    edit(model.model.layers[0].self_attn)
    flap(model)


def narrow_values(attention):
    attention.v_proj = nn.Linear(16, 4)


def wide_norm(attention):
    attention.q_norm = nn.LayerNorm(16)


def other_head_size(attention):
    attention.head_dim = 3


def third_matrix(model):
    model.model.layers[0].mlp.inner = nn.Linear(24, 16)


def lone_matrix(model):
    model.model.layers[0].mlp = nn.Linear(16, 16)


class TokenSamples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": TOKENS[index]}


REFUSALS = [
    (lambda: Unstructured(1.0), ValueError, r"`sparsity` must be in \[0, 1\), got 1.0. Use 0.5"),
    (lambda: parse_pattern(-0.1), ValueError, r"must be in \[0, 1\), got -0.1"),
    (lambda: parse_pattern(float("nan")), ValueError, r"must be in \[0, 1\), got nan"),
    (lambda: SemiStructured(5, 4), ValueError, "needs 1 <= n <= m, got 5:4. Use 2:4"),
    (lambda: parse_pattern("0:4"), ValueError, "needs 1 <= n <= m, got 0:4"),
    (lambda: parse_pattern("half"), ValueError, "A pattern is a sparsity such as 0.5 .* got 'half'"),
    (
        lambda: find_refinement("swaps"),
        ValueError,
        "`refinement` must be one of 'dsnot', 'swap', or a value .* got 'swaps'",
    ),
    (lambda: as_matrix(nn.Embedding(3, 3), torch.zeros(3, 3)), TypeError, "one of `Linear`.* got Embedding"),
    (lambda: prune(llama()), ValueError, "Expected one of `pattern`, .* and `sparsity`, .* got neither"),
    (lambda: prune(llama(), 0.5, sparsity=0.4), ValueError, "got pattern=0.5 and sparsity=0.4"),
    (
        lambda: prune(llama(), 0.5, update="yes"),
        TypeError,
        "`update` must be True, False or a `LeastSquares`, got 'yes'",
    ),
    (lambda: SparseGPT(damping=0), ValueError, "`damping` of SparseGPT must be above 0, got 0"),
    (
        lambda: chosen("criterion", CRITERIA, "ria", {"power": 2}),
        ValueError,
        "`criterion='ria'` has no option 'power'. Its options are 'exponent'",
    ),
    (
        lambda: chosen("criterion", CRITERIA, SparseGPT(), {"damping": 0.1}),
        ValueError,
        "`criterion_options` goes with a name, but `criterion` is the value SparseGPT.* Put the options into",
    ),
    (
        lambda: Criterion(None, group="matrix"),
        TypeError,
        "`score` must be a function .* got NoneType. For SparseGPT use",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="wand"),
        ValueError,
        "`criterion` must be one of 'magnitude', .* got 'wand'. A function",
    ),
    (lambda: prune(llama(), 0.5, group="column"), ValueError, "`group` must be one of 'row', .* got 'column'"),
    (
        lambda: prune(llama(), "2:4", group="row"),
        ValueError,
        "2:4 compares within each 4 inputs. Remove `group='row'`",
    ),
    (lambda: Criterion(Magnitude().score, group="rows"), ValueError, "`group` must be one of 'row', .* got 'rows'"),
    (
        lambda: Criterion(Magnitude().score, group="row", needs="inputs"),
        ValueError,
        "`needs` must be a tuple .* got 'inputs'",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="sparsegpt", group="row", calibration=TOKENS),
        ValueError,
        "'sparsegpt' compares within 128 columns, .* Remove `group='row'`",
    ),
    (lambda: prune(llama(), {"q_proj": 0.5}, group="model"), ValueError, "`pattern` is a dict that gives them"),
    (
        lambda: prune(llama(), {"q_proj": 0.5}, allocation="erk"),
        ValueError,
        "`allocation` divides one sparsity among the layers, but `pattern` is a dict",
    ),
    (
        lambda: prune(llama(), 0.5, allocation="erk", group="model"),
        ValueError,
        '`group="model"` finds the sparsity of each layer itself. .* `allocation="global"` compares',
    ),
    (
        lambda: prune(llama(), "2:4", allocation="erk"),
        ValueError,
        "2:4 fixes the sparsity of every group .* `allocation=\"owl\"`, .* got allocation 'erk'",
    ),
    (
        lambda: prune(llama(), 0.5, allocation="owl"),
        ValueError,
        "Expected `calibration`, because allocation 'owl' measures the inputs of each layer. Pass token ids",
    ),
    (
        lambda: prune(llama(), 0.5, allocation={"q_prj": 0.5}),
        ValueError,
        "'q_prj' in `allocation` matches no weight",
    ),
    (lambda: prune(llama(), 0.5, allocation={"q_proj": 0.5}), ValueError, "a mapping that has none for .*k_proj'"),
    (
        lambda: prune(llama(), 0.5, group="model", update=True, calibration=TOKENS),
        ValueError,
        '`group="model"` selects in all layers at once.* Use `allocation="global"`',
    ),
    (
        lambda: prune(llama(), 0.5, criterion="sparsegpt", refinement="swap", calibration=TOKENS),
        ValueError,
        "'sparsegpt' updates the weights while it selects, .* Remove `refinement`",
    ),
    (
        lambda: prune(llama(), 0.5, refinement="swap"),
        ValueError,
        "Expected `calibration`, because refinement 'swap' measures the inputs of each layer. Pass token ids",
    ),
    (
        lambda: arguments(sparsity=0.5, allocation="best"),
        ValueError,
        "`allocation` must be one of 'uniform', .* got 'best'",
    ),
    (
        lambda: arguments(sparsity=0.5, allocation="erk", allocation_options="power=2"),
        ValueError,
        "`allocation_options` must be a dict, or JSON .* Got `allocation_options='power=2'` and `allocation='erk'`",
    ),
    (
        lambda: beside("magnitude"),
        ValueError,
        "Expected the same call in all 2 processes, got 'wanda, row, .* to 0.5 .* Give",
    ),
    (
        lambda: beside("", "OSError: full"),
        RuntimeError,
        "process 1 stopped with OSError: full. Correct the error",
    ),
    (streamed_by_two, ValueError, "Expected one process, because one output is written, got 2. Start it in one"),
    (lambda: prune(llama(), {}), ValueError, "`pattern` is an empty dict, which prunes nothing"),
    (lambda: prune(llama(), {"*.q_proj": 0.5}), ValueError, r"'\*.q_proj' in `pattern` is no regular expression"),
    (lambda: prune(llama(), {"x_proj": 0.5}), ValueError, "'x_proj' in `pattern` matches no weight, .* end in q_proj"),
    (
        lambda: prune(llama(), {"q_proj|k_proj": 0.5, "k_proj": 0.25}),
        ValueError,
        "'k_proj' in `pattern` matches no weight, or only weights that an earlier key matches",
    ),
    (
        lambda: prune(tiny("mixtral"), {"experts": 0.5}),
        ValueError,
        "'experts' in `pattern` matches no weight, .* k_proj, v_proj, o_proj, gate_up_proj, down_proj.$",
    ),
    (lambda: prune(llama(), {"q_proj": 1.5}), ValueError, r"`sparsity` must be in \[0, 1\), got 1.5"),
    (lambda: prune(llama(), {"q_proj": "5:4"}), ValueError, "needs 1 <= n <= m, got 5:4"),
    (
        lambda: prune(llama(), {"q_proj": "2:4", "k_proj": 0.5}, group="row"),
        ValueError,
        "2:4 compares within each 4 inputs. Remove `group='row'`",
    ),
    (
        lambda: prune(llama(), {"q_proj": "2:4", "k_proj": "2:5"}),
        ValueError,
        "2:5 .* 'model.layers.0.self_attn.k_proj",
    ),
    (lambda: prune(llama(), 0.5, target_modules=["q_prj"]), ValueError, "'q_prj' in `target_modules` matches no"),
    (lambda: prune(llama(), 0.5, exclude_modules=["x"]), ValueError, "'x' in `exclude_modules` .* end in q_proj, k_"),
    (lambda: prune(llama(), 0.5, target_modules="nothing.*"), ValueError, "`target_modules='nothing.*'` .* leaves no"),
    (lambda: prune(nn.Sequential(nn.Linear(2, 2)), 0.5), ValueError, "Expected a model with blocks"),
    (
        lambda: prune(llama(), "2:5"),
        ValueError,
        "2:5 needs a number of inputs divisible by 5, but .*q_proj' has 16 .21 such",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="wanda"),
        ValueError,
        "Expected `calibration`, because criterion 'wanda' measures the inputs .* Pass token ids",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="wanda", target_modules=["lm_head"], calibration=TOKENS),
        ValueError,
        "'lm_head' lies outside the blocks",
    ),
    (
        lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS.float()),
        ValueError,
        "Expected `calibration` as token ids, .* got torch.float32",
    ),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=TOKENS[0]), ValueError, r"of shape \(8,\)"),
    (lambda: prune(llama(), 0.5, criterion="wanda", calibration=[]), ValueError, "`calibration` holds no batch"),
    (
        lambda: wanda(llama(), calibration={"input_ids": TOKENS}),
        ValueError,
        "got dict. .* Put a single batch into a list",
    ),
    (
        lambda: wanda(llama(), calibration=[{"input_ids": [1, 2]}]),
        ValueError,
        "at least one tensor, got dict. .* pass `r",
    ),
    (
        lambda: wanda(llama(), activations="ram"),
        ValueError,
        "`activations` must be one of 'device', 'cpu', 'disk', got",
    ),
    (
        lambda: prune(llama(nan_weight), 0.5),
        ValueError,
        "layers.1.mlp.up_proj' holds NaN or infinity. Correct",
    ),
    (
        lambda: prune(llama(nan_norm), 0.5, criterion="wanda", calibration=TOKENS),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.1.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(), calibration=[{"inputs_embeds": torch.full((1, 4, 16), torch.nan)}]),
        ValueError,
        "Expected finite inputs, but those of layer 'model.layers.0.self_attn.q_proj' hold NaN",
    ),
    (
        lambda: wanda(llama(zero_norm)),
        ValueError,
        "All inputs of layer 'model.layers.1.self_attn.q_proj' are zero, so they say nothing about its weights. Check",
    ),
    (
        lambda: wanda(llama(unused_layer)),
        ValueError,
        "'model.layers.0.idle' saw no calibration token.* add 'model.layers.0.idle' to `exclude_modules`",
    ),
    (
        lambda: wanda(tiny("mixtral"), calibration=TOKENS[:1, :1]),
        ValueError,
        r"experts.gate_up_proj.\d' saw no calibration token.* add '[\w.]*.gate_up_proj' to `exclude_modules`",
    ),
    (
        fickle,
        RuntimeError,
        "Expected 'layers.0.two' to have the inputs of 'layers.0.one' on every batch, .* Prune these",
    ),
    (grouped_convolution, TypeError, "Expected a Conv2d without groups .* got groups=2, .* Add it to `exclude_mod"),
    (
        lambda: prune(llama(), 0.5, criterion=lambda weight, _: weight[0]),
        ValueError,
        r"scores of shape \(16, 16\) for 'model.layers.0.self_attn.q_proj', got \(16,\)",
    ),
    (
        lambda: prune(llama(), 0.5, criterion=lambda weight, _: weight / 0),
        ValueError,
        "Expected finite scores for 'model.layers.0.self_attn.q_proj', got NaN or infinity",
    ),
    (headless_gradients, ValueError, '"gblm" needs a loss, and LlamaModel returned none. Give .* with `labels`'),
    (
        lambda: prune(llama(unused_layer), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        r"No gradient reached 'model.layers.0.idle' \(1 such weights\)",
    ),
    (
        lambda: prune(llama(nan_head), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        "The gradient of 'model.layers.2.mlp.down_proj' is not finite. Run the model in float32",
    ),
    (
        lambda: prune(adapted(), 0.5, criterion="gblm", calibration=TOKENS),
        ValueError,
        "'gblm' needs gradients of the weights .*q_proj' runs with an adapter. .* `with model.disable_adapter",
    ),
    (
        lambda: sparsegpt(torch.ones(2, 2), torch.eye(2)),
        ValueError,
        "either a `pattern` to select by or a `mask` to keep, got both or neither",
    ),
    (
        lambda: sparsegpt(torch.ones(2, 2), -torch.eye(2), Unstructured(0.5)),
        ValueError,
        r"Expected a positive definite Hessian, but X\^T X is not",
    ),
    (
        lambda: sparsegpt(torch.full((2, 2), torch.nan), torch.eye(2), Unstructured(0.5)),
        ValueError,
        "Expected finite weights from SparseGPT, got NaN",
    ),
    (unpicturable, ImportError, "A picture needs matplotlib, which is not installed. Run: pip install matplotlib"),
    (
        lambda: sample_sequences(["a b c", "a b"], words, count=2, length=2),
        ValueError,
        "Expected 2 documents of more than 2 tokens, found 1 among 2. Give more",
    ),
    (
        lambda: pack_sequences(["a b", "c"], words, length=4),
        ValueError,
        "Expected a text of at least one sequence of 4 tokens, got 3 tokens",
    ),
    (no_norms, ValueError, "Expected blocks with a normalisation layer, which tells the hidden size"),
    (
        lambda: plan_pruning(LlamaConfig(), 0.5),
        ValueError,
        r"names one class of transformers in `architectures`, got \[\]",
    ),
    (lambda: streamed(edit=forget_the_class), ValueError, "names one class of transformers in `architectures`, got"),
    (
        lambda: streamed(edit=occupy),
        ValueError,
        "pruned' not to exist, to be empty, or to hold only what a killed run left. Give another `output`",
    ),
    (lambda: streamed(edit=remove_weights), ValueError, "Expected model.safetensors or model.safetensors.index.json"),
    (lambda: streamed(group="model"), ValueError, "One block at a time is in memory, .* Use `prune`"),
    (
        lambda: streamed(criterion="gblm", calibration=TOKENS),
        ValueError,
        "criteria that need gradients need the whole model",
    ),
    (lambda: streamed(tiny("t5")), ValueError, "one stack of blocks, got several: encoder.block, decoder.blo"),
    (
        lambda: streamed(tiny("mixtral"), original=True),
        ValueError,
        "The checkpoint has no tensor 'model.layers.0.mlp.experts.down_proj' .* `save_pretrained.*save_original_form",
    ),
    (
        lambda: streamed(target_modules=["lm_head"]),
        ValueError,
        "'lm_head' lies outside the blocks, which are all that is pruned on disk. Add it",
    ),
    (
        lambda: allocated("layerwise"),
        ValueError,
        "`allocation` must be one of 'uniform', .* got 'layerwise'. A dict of sparsities by layer",
    ),
    (
        lambda: allocated("erk", 0.99),
        ValueError,
        "between 4 and 30 zeros in total, .* got one that gives 31. Choose another sparsity",
    ),
    (
        lambda: allocated("owl"),
        ValueError,
        "needs the input norms of each weight, got none for 'one'. Pass calibration",
    ),
    (
        lambda: allocated({"one": 0.5}),
        ValueError,
        "Expected a sparsity for each weight .* got a mapping that has none for 'two'. Give the sparsity of all",
    ),
    (
        lambda: allocated({"one": 0.5, "two": 0.75}),
        ValueError,
        "give 16 zeros in total, 0.500000 of the entries, got .* 20, 0.625000. Change the sparsities",
    ),
    (lambda: prune(merged(), 0.5), ValueError, "has merged adapters, and unmerging would restore"),
    (lambda: prune(tiny("gpt2"), 0.5, target_modules=["lm_head"]), ValueError, "'lm_head' is also the embedding"),
    (
        lambda: prune(llama().to("meta"), 0.5),
        ValueError,
        "is torch.float32 on meta, but pruning needs floating-point weights in memory",
    ),
    (lambda: perplexity(llama(nan_norm), TOKENS), ValueError, "Expected a finite loss, got nan"),
    (
        lambda: perplexity(llama(), TOKENS[:, :1]),
        ValueError,
        "at least one token to predict, got none. Give sequences",
    ),
    (lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS * 0 - 100}]), ValueError, "to predict, got"),
    (
        lambda: perplexity(llama(), TOKENS.float()),
        ValueError,
        "Expected `sequences` as token ids, .* got torch.float32",
    ),
    (lambda: perplexity(llama(), "text"), ValueError, "Expected `sequences` as token ids .* got str. Make token ids"),
    (lambda: perplexity(llama(), ["text"]), ValueError, "each batch of `sequences` as a dict .* got str. Make token"),
    (lambda: perplexity(llama(), []), ValueError, "`sequences` holds no batch. Give at least one sequence"),
    (
        lambda: perplexity(llama(), [{"inputs_embeds": torch.zeros(1, 4, 16)}]),
        ValueError,
        "Perplexity needs `labels` or `input_ids`, got a batch of 'inputs_embeds'. Add `labels`",
    ),
    (
        lambda: perplexity(AutoModel.from_config(CONFIGS["llama"]), TOKENS),
        ValueError,
        "Perplexity needs logits, and LlamaModel returned none. Give a model with a language-modelling head",
    ),
    (
        lambda: perplexity(llama(), [{"input_ids": TOKENS, "labels": TOKENS[:, 1:]}]),
        ValueError,
        r"logits for each label, got logits \(4, 8, 61\) and labels \(4, 7\) from LlamaForCausalLM. Give a language",
    ),
    (lambda: MaskLoRAConfig(r=0), ValueError, "`r` must be a positive integer, got 0"),
    (lambda: MaskLoRAConfig(rank_pattern={"q": -1}), ValueError, r"`rank_pattern\['q'\]` must be a positive integer"),
    (
        lambda: MaskLoRAConfig(lora_alpha=None),
        ValueError,
        "`lora_alpha` must be a number, got None. Use `lora_alpha=r`",
    ),
    (lambda: MaskLoRAConfig(lora_dropout=1.0), ValueError, r"`lora_dropout` must be in \[0, 1\), got 1.0"),
    (lambda: MaskLoRAConfig(bias="some"), ValueError, "`bias` must be one of .* got 'some'"),
    (lambda: MaskLoRAConfig(on_mask_mismatch="no"), ValueError, "`on_mask_mismatch` must be one of"),
    (
        lambda: MaskLoRAConfig(target_modules="all-linear", layers_to_transform=[1]),
        ValueError,
        "`layers_to_transform` cannot be used when `target_modules` is a str. Got 'all-linear'. Pass a list",
    ),
    (
        lambda: get_peft_model(llama(), MaskLoRAConfig(target_modules=["embed_tokens"])),
        TypeError,
        "Target module Embedding.* is not supported. MaskLoraModel adapts",
    ),
    (
        lambda: MaskLoRAConfig(format_version=99),
        ValueError,
        "format version 99. The installed .* up to 1. Upgrade the pack",
    ),
    (lambda: MaskLoRAConfig(masking="later"), ValueError, "`masking` must be one of .* got 'later'"),
    (lambda: ScaledLoRAConfig(init_weights="pissa"), ValueError, "`init_weights` must be one of .* got 'pissa'"),
    (lambda: adapted(train_head="full", model=headless()), ValueError, "needs a model with an output head"),
    (
        lambda: adapted(train_head="adapter", model=tiny("gpt2")),
        ValueError,
        "'lm_head' shares its weight with the emb",
    ),
    (lambda: adapted()(TOKENS, adapter_names=["default"]), ValueError, "Length of `adapter_names` .* got 1 and 4"),
    (
        lambda: merged().eval()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "Cannot pass `adapter_names` when there are",
    ),
    (
        lambda: adapted().train()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "when the model is in training mode. Call `model.eval",
    ),
    (
        lambda: adapted()(TOKENS, adapter_names=["other"] * 4),
        ValueError,
        "non-existing adapter.*: other. The model has default",
    ),
    (unreadable, TypeError, "The weights of stub layers cannot be read, .* saved with `save_mask=True`"),
    (foreign_mask, ValueError, "adapter 'default'. The mask .* keeps 25.0% of the .* Load the"),
    (other_parameters, ValueError, "the same `target_parameters`. Adapter 'default' has .*gate_up_proj"),
    (mamba, ValueError, "'out_proj' of a mamba model cannot be adapted, because .* Leave out_proj"),
    (lambda: experts(lora_dropout=0.1), ValueError, "`lora_dropout` must be 0 for `target_parameters`, got 0.1"),
    (
        lambda: experts().eval()(TOKENS, adapter_names=["default"] * 4),
        ValueError,
        "are not supported with `target_parameters`. Choose one",
    ),
    (vector_parameter, ValueError, "needs parameters of 2 or 3 dimensions, got 'weight' of shape"),
    (mismatch, ValueError, "trained on other zeros .* in 1 of 1 layers .*lm_head: adapter 0.5123, model 0.0000"),
    (lambda: nan_adapter().merge_adapter(safe_merge=True), ValueError, "NaNs detected in the merged weights"),
    (lambda: register("mask_lora", ForeignConfig, MaskLoraModel), RuntimeError, "'mask_lora' is registered already"),
    (lambda: arguments(sparsity=1.5), ValueError, r"must be in \[0, 1\), got 1.5"),
    (lambda: arguments(pattern="2:4", sparsity=0.7), ValueError, '`sparsity=0.7` contradicts `pattern="2:4"`'),
    (lambda: arguments(group="all"), ValueError, "`group` must be one of .* got 'all'"),
    (lambda: arguments(recovery="rest"), ValueError, "`recovery` must be one of 'retrain', .* got 'rest'"),
    (lambda: arguments(calibration_samples=0), ValueError, "`calibration_samples` must be at least 1, got 0"),
    (
        lambda: SparseTrainer(llama(), TrainingArguments("unused", use_cpu=True)),
        TypeError,
        "Expected `args` as SparseTrainingArguments, got TrainingArguments",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(sparsity=0.5, criterion="wanda")),
        ValueError,
        "Calibration uses the first 128 samples of `train_dataset`, and there is none. Pass `train_dataset`",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(sparsity=0.5, criterion="wanda"), train_dataset=TokenSamples()),
        ValueError,
        "`calibration_samples=128` needs as many training samples, and the training set has only 4. Lower",
    ),
    (lambda: flap(ratio=1.0), ValueError, r"`ratio` must be in \[0, 1\), got 1.0. Use 0.2"),
    (lambda: flap(ratio=-0.1), ValueError, r"`ratio` must be in \[0, 1\), got -0.1"),
    (lambda: flap(metric="flap"), ValueError, "`metric` must be one of 'wifv', .* got 'flap'"),
    (lambda: flap(structure="al"), ValueError, "`structure` must be one of 'al-am', .* got 'al'"),
    (
        lambda: flap(target_modules=["heads"]),
        ValueError,
        "'heads' in `target_modules` matches no prunable layer. Prunable layers here end in self_attn, mlp, q_proj",
    ),
    (
        lambda: flap(target_modules=["q_proj"], exclude_modules=["self_attn"]),
        ValueError,
        r"`target_modules=\['q_proj'\]` with `exclude_modules=\['self_attn'\]` leaves no attention and no",
    ),
    (
        lambda: compact(tiny("gpt2")),
        ValueError,
        "cannot find the heads or neurons of 'transformer.h.0.attn': expected",
    ),
    (lambda: flap(attention_ratio=0.2), ValueError, "`attention_ratio` must be in .* got 0.2 with 'al-am'. Leave it"),
    (lambda: flap(structure="al-mm", attention_ratio=1.0), ValueError, "`attention_ratio` must be .* got 1.0 with"),
    (lambda: flap(calibration=None), ValueError, "Metric 'wifv' needs statistics of the inputs .* Pass token ids"),
    (
        lambda: flap(calibration=None, metric="magnitude_sp"),
        ValueError,
        "`compensate=True` needs statistics of the inputs .* Pass token ids",
    ),
    (lambda: flap(activations="ram"), ValueError, "`activations` must be one of 'device', 'cpu', 'disk', got 'ram'"),
    (
        lambda: flap(ratio=0.95),
        ValueError,
        "`ratio=0.95` would remove every head or neuron of a layer. .* so at most 0.775 can be removed. Use a",
    ),
    (
        lambda: flap(ratio=0.6, structure="ul-um"),
        ValueError,
        "every head or neuron of a layer of 'model.layers.0'. .* at most 0.5 .* `structure=\"al-am\"`",
    ),
    (lambda: flap(llama(nan_weight)), ValueError, "layers.1.mlp.up_proj' holds NaN or infinity. Correct"),
    (lambda: flap(llama().to("meta")), ValueError, "needs loaded .* is torch.float32 on meta. Load the model"),
    (lambda: compact(llama().to("meta")), ValueError, "needs loaded .* is torch.float32 on meta. Load the model"),
    (lambda: flap(adapted()), ValueError, "without adapters, but layer 'model.layers.0.self_attn.q_proj' has an"),
    (lambda: compact(adapted()), ValueError, r"without adapters, .* Call `merge_and_unload\(\)` first"),
    (lambda: compact(nn.Linear(2, 2)), TypeError, "Expected a model of Transformers, .* got Linear"),
    (lambda: flap(nn.Sequential(nn.Linear(2, 2))), ValueError, "Expected a model with blocks .* heads and neurons of"),
    (lambda: flap(tiny("gpt2")), ValueError, "'transformer.h.0.attn': expected separate query, .* got c_attn, c_proj"),
    (
        lambda: flap(tiny("gpt_neox")),
        ValueError,
        "neurons of 'gpt_neox.layers.0.attention': .* got query_key_value, de",
    ),
    (
        lambda: flap(tiny("mixtral")),
        ValueError,
        "'model.layers.0.mlp': expected a dense MLP, got experts. Leave it out",
    ),
    (lambda: flap(tiny("bart")), ValueError, "'model.decoder.layers.0': expected one attention .* got 2 attentions"),
    (
        lambda: heads(narrow_values),
        ValueError,
        "as many query rows as output columns, and as many key .* got 16, 16, 8 and 4",
    ),
    (lambda: heads(wide_norm), ValueError, "expected no parameters except projections and norms .* got q_norm.weight"),
    (lambda: flap(tiny("gpt_oss"), target_modules=["self_attn"]), ValueError, "norms of single heads, got sinks"),
    (lambda: heads(other_head_size), ValueError, "expected a `head_dim` that divides 8 key rows, got 3"),
    (
        lambda: flap(llama(third_matrix)),
        ValueError,
        "expected layers of 24 rows before the output layer, got 24, 24, 16",
    ),
    (lambda: flap(llama(lone_matrix)), ValueError, "expected an MLP of at least two nn.Linear layers .* got 1 of"),
    (
        lambda: saving.CompactNothing,
        AttributeError,
        "Expected a name of this module or Compact<class of Transformers>, got 'CompactNothing'",
    ),
    (
        lambda: CompactConfig.from_dict({"layer_widths": []}),
        ValueError,
        "Expected `dense_model_type` to be a model type of Transformers, got None. Restore",
    ),
    (
        lambda: rebuild(region="layer"),
        ValueError,
        "`region` must be \"matrix\", .* a number of blocks of at least 1, got 'layer'",
    ),
    (lambda: rebuild(mode="DS"), ValueError, "`mode` must be one of 'DD', 'SS', 'SD', got 'DS'"),
    (lambda: rebuild(loss="ce"), ValueError, "`loss` must be one of 'mse', 'relative_mse', 'cosine', got 'ce'"),
    (lambda: rebuild(pattern=None), ValueError, "Expected either `pattern` .*, or `dense`, .*; got neither"),
    (
        lambda: rebuild(region="matrix", mode="SD"),
        ValueError,
        "solves a least-squares problem for each .* Use `region=",
    ),
    (
        lambda: rebuild(tuner="lora"),
        TypeError,
        "`tuner` must be \"full\" or the configuration of a PEFT .* got 'lora'",
    ),
    (
        lambda: rebuild(tuner=MaskLoRAConfig(train_head="full")),
        ValueError,
        "`train_head='full'` trains parameters that belong to no region. Leave it out",
    ),
    (
        lambda: rebuild(tuner=MaskLoRAConfig(target_modules=["lm_head"])),
        ValueError,
        "`target_modules={'lm_head'}` of the tuner matches none of the pruned weights",
    ),
    (
        lambda: rebuild(tuner=LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=1e-2),
        ValueError,
        "The tuner filled zeros of 'model.layers.0.self_attn.q_proj' .* such as MaskLoRAConfig",
    ),
    (lambda: rebuild(holdout=1.0), ValueError, r"`holdout` must be in \[0, 1\), got 1.0"),
    (
        lambda: rebuild(group="model"),
        ValueError,
        '`group="model"` compares the weights of all regions with each other',
    ),
    (
        lambda: rebuild(pattern=None, dense=tiny("llama"), update=True),
        ValueError,
        "`allocation`, `refinement` and `update` are part of pruning, .* Remove them, or pass them to `prune`",
    ),
    (lambda: rebuild(batch_size=0), ValueError, "`batch_size` must be at least 1, got 0"),
    (lambda: reconstruct(llama(), 0.5), ValueError, "Expected `calibration`, because a region is fitted on its"),
    (
        lambda: rebuild(adapted()),
        ValueError,
        "has adapters, but reconstruction attaches and merges adapters of its own",
    ),
    (lambda: rebuild(pattern=None, dense=shallow()), ValueError, "Expected `dense` .* got one with other blocks"),
    (lambda: rebuild(llama(), activations="gpu"), ValueError, "`activations` must be one of 'device', .* got 'gpu'"),
    (
        lambda: rebuild(post_norm()),
        ValueError,
        "Expected a block .*, but 'model.encoder.layers.0' computes something else; .* Use `region=\"block\"`",
    ),
    (other_state, ValueError, "holds the state of a run with another data. Resume with the same model, data"),
    (other_region, ValueError, "holds the state of a run with another model. Resume with the same model, data"),
    (
        reconstructed_by_trainer,
        RuntimeError,
        "stopped reconstruction in 'model.layers.0 .attention.'. The 0 regions before .* Load the model again",
    ),
    (
        lambda: reconstructed_by_trainer(resume_from_checkpoint="no-such-folder"),
        ValueError,
        "Expected 'no-such-folder' to hold the finished regions of a reconstruction, found none. Resume with",
    ),
    (
        lambda: arguments(recovery="reconstruct", sparsity=0.5, save_on_sigterm=True),
        ValueError,
        "can be resumed with `resume_from_checkpoint=True` after any interruption. Leave `save_on_sigterm` out",
    ),
    (lambda: reconstructed_by_trainer(trial={}), ValueError, "`hyperparameter_search` does not support `recovery=.*"),
    (
        lambda: wanda(TwoTowers(), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "No calibration batch runs the blocks of 'two'. Give batches that do, .* or leave these layers out",
    ),
    (
        lambda: wanda(Stairs(in_place=False), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* Prune by a criterion that needs no",
    ),
    (
        lambda: wanda(Stairs(in_place=True), calibration=[{"x": torch.ones(1, 2, 4)}]),
        ValueError,
        "Between 'steps.0' and 'steps.1' the model changes the hidden states, .* or give batches for which the model",
    ),
    (flattened, ValueError, "FSDP1 flattens weights, .* Set `fsdp_version: 2` in the configuration of accelerate"),
    (flattening_trainer, ValueError, "FSDP1 flattens weights, .* Set `fsdp_version: 2` in the configuration"),
    (
        changed_of_mind,
        ValueError,
        "have `pattern=0.6`, and had `pattern=0.5` when this SparseTrainer was made. .* Make a new SparseTrainer",
    ),
    (nan_hessian, ValueError, "Expected a finite solution of the masked least squares, got NaN or infinity"),
    (
        lambda: arguments(recovery="reconstruct", sparsity=0.5, fp16=True),
        ValueError,
        "Reconstruction does not scale the loss, and `fp16` needs that. Use `bf16=True`",
    ),
    (
        lambda: SparseTrainer(adapted(), arguments(sparsity=0.5), peft_config=MaskLoRAConfig()),
        ValueError,
        "`peft_config` attaches an adapter, and the model has adapters already. Leave `peft_config` out, or pass",
    ),
    (
        lambda: SparseTrainer(adapted(), arguments(sparsity=0.5, recovery="reconstruct")),
        ValueError,
        "Reconstruction attaches and merges an adapter for each region, .* Pass the plain model",
    ),
    (lambda: scheduled("cosine"), ValueError, "The retraining schedule must be one of 'ft', .* got 'cosine'"),
    (
        lambda: scheduled("llr", lambda t: 0.1),
        ValueError,
        "`original` is a function, and its number of steps .* Pass `original_steps`",
    ),
    (
        lambda: scheduled("llr", [0.0, 0.0]),
        ValueError,
        "Got 3 steps for 1 rounds, and 2 learning rates from 0.0 to 0.0",
    ),
    (
        lambda: scheduled("llr", lr=0.0),
        ValueError,
        "multiplies the `lr` of the optimiser, which is 0.0. Pass an optimiser with a positive `lr`",
    ),
    (lambda: scheduled("allr"), ValueError, '"allr" depends on how much pruning removed. Pass `norm_drop`'),
    (
        lambda: scheduled("ft", [0.1, 0.0]),
        ValueError,
        '"ft" continues with the last learning rate .* which is 0. Use "lrw"',
    ),
    (
        lambda: scheduled("lrw", [0.1, 0.1]),
        ValueError,
        '"lrw" repeats the last 3 learning rates .* has only 2. Retrain for',
    ),
    (
        lambda: norm_drop((1.0, 4), (1.0, 4)),
        ValueError,
        'Pruning made no further entry zero, .* Start from the dense model, or use "llr"',
    ),
    (
        lambda: arguments(retraining_schedule="llr", recovery="reconstruct", sparsity=0.5),
        ValueError,
        "`retraining_schedule='llr'` is a schedule for training with the task loss. Leave it out",
    ),
    (
        lambda: arguments(retraining_schedule="allr"),
        ValueError,
        "`retraining_schedule='allr'` depends on the number of steps .* Set `original_steps`",
    ),
    (
        lambda: arguments(
            retraining_schedule="llr", lr_scheduler_type="reduce_lr_on_plateau", **EVALUATED
        ).original_rates(3),
        ValueError,
        "and those of ReduceLROnPlateau are not known before it runs. Set the `lr_scheduler_type`",
    ),
    (
        lambda: CubicSchedule(0, 5),
        ValueError,
        "`rounds` and `interval` of at least 1, .* Got rounds=0, interval=5, .* prunes every 50 steps",
    ),
    (
        lambda: CubicSchedule(4, 5).sparsities(0.5, 20),
        ValueError,
        "The last of 4 rounds prunes after step 20, and the run has 20 steps. .* Train for more steps",
    ),
    (
        lambda: CubicSchedule(4, 5, initial_sparsity=0.5).sparsities(0.5, 30),
        ValueError,
        "must be above the initial one, got 0.5 and `initial_sparsity=0.5`. Request a higher sparsity",
    ),
    (lambda: PruningCycles(0), ValueError, "`rounds` must be at least 1, got 0. One round prunes"),
    (
        lambda: PruningCycles(4).sparsities(0.5, 3),
        ValueError,
        "4 cycles need at least 4 optimiser steps, .* has 3. Train for",
    ),
    (
        lambda: PruningCallback("2:4", schedule=PruningCycles(2)),
        ValueError,
        "A schedule raises a single sparsity, and the pattern is '2:4'. Pass a sparsity such as 0.5",
    ),
    (
        lambda: cycles(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))),
        ValueError,
        "merges and resets the adapters, and 'base_model.model.model.layers.0.self_attn.q_proj', a Linear, does not",
    ),
    (
        lambda: cycles(adapted(), 3),
        FileNotFoundError,
        "pruned several times during training. The file '.*pruned_base.safetensors' .* Resume with the `output_dir`",
    ),
    (teacher_in_parts, ValueError, "The teacher's weights are sharded over processes, .* Load the teacher before"),
    (
        lambda: prune_in_parts(llama()),
        ValueError,
        'Calibration needs whole blocks, and the weights are sharded .* Or prune by criterion "magnitude"',
    ),
    (
        lambda: SparseTrainingArguments("unused", save_on_sigterm=True, enable_jit_checkpoint=True),
        ValueError,
        "`save_on_sigterm` and `enable_jit_checkpoint` both handle SIGTERM. Set one of them",
    ),
    (
        lambda: merged_state_dict(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))),
        TypeError,
        "Expected one MaskLoRA or ScaledLoRA layer around .*, got Linear at .*q_proj'. Call `merge_and_unload",
    ),
    (
        lambda: cycles(adapted(), load_best_model_at_end=True, save_strategy="steps", save_steps=1, **EVALUATED),
        ValueError,
        "`load_best_model_at_end` may load a checkpoint of lower sparsity, .* Set it to False",
    ),
    (
        lambda: arguments(sparsity=0.5, pruning_schedule="linear"),
        ValueError,
        "`pruning_schedule` must be one of 'cubic', 'cycles', got 'linear'. Leave it out",
    ),
    (
        lambda: arguments(pruning_schedule="cubic"),
        ValueError,
        "`pruning_schedule='cubic'` prunes to `sparsity` during training. It needs `sparsity` and .* only \"cycles\"",
    ),
    (
        lambda: plan_training(llama(), strategy="tp"),
        ValueError,
        "`strategy` must be one of 'ddp', 'fsdp', 'zero2', 'zero3', got 'tp'",
    ),
    (lambda: plan_training(llama(), devices=0), ValueError, "`devices` must be at least 1, got 0"),
    (
        lambda: plan_training(adapted(), MaskLoRAConfig()),
        ValueError,
        "has adapters already. Leave `peft_config` out, or pass a model without",
    ),
    (
        lambda: plan_training(AutoModel.from_config(CONFIGS["llama"])),
        ValueError,
        "LlamaModel cannot be run on tensors without values .* Pass a language model with its head",
    ),
    (
        lambda: plan_training(integer_parameters()),
        ValueError,
        "got torch.int8 for 'weight': quantised layers .* Plan the model in half precision",
    ),
    (
        lambda: arguments(distillation="labels"),
        ValueError,
        "`distillation` must be one of 'logits', 'hidden_states', got 'labels'",
    ),
    (
        lambda: arguments(distillation="logits", distillation_weight=1.5),
        ValueError,
        r"`distillation_weight` must be in \(0, 1\] .* got 1.5 and 1.0. To train with the task loss alone",
    ),
    (
        lambda: arguments(distillation="logits", recovery="reconstruct", sparsity=0.5),
        ValueError,
        "Reconstruction fits the outputs of the dense model already, .* Leave `distillation` out",
    ),
    (
        lambda: arguments(distillation="logits", use_liger_kernel=True),
        ValueError,
        "With `use_liger_kernel` the model returns no logits .* Set `use_liger_kernel=False`",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(), teacher=llama()),
        ValueError,
        "`teacher` is given without `distillation`. Set distillation=",
    ),
    (
        lambda: SparseTrainer(llama(), arguments(distillation="logits")),
        ValueError,
        "`distillation='logits'` needs the dense model. Pass it as `teacher`, or set `sparsity`",
    ),
    (two_gpus, ValueError, "one process per GPU, and this process has 2 GPUs. Start the script"),
    (
        lambda: SparseTrainer(half_pruned(), arguments(distillation="logits", sparsity=0.6)),
        ValueError,
        "needs a dense teacher, and 50.0% of the model's weights are zero already. .* SparseTrainer\\(..., teacher=",
    ),
    (
        lambda: check_teacher(llama(), tiny("mistral"), "hidden_states"),
        ValueError,
        "Teacher and model differ in the number of blocks: 3 and 2. Pass the dense model",
    ),
    (lambda: shared_teacher(llama()), ValueError, "The teacher shares parameters .* copy.deepcopy"),
    (
        lambda: predictions(llama(), {"input_ids": TOKENS}),
        ValueError,
        "Distillation needs `labels` among the inputs, .* The inputs are input_ids. Add `labels`",
    ),
    (
        lambda: logits_loss(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2).bool()),
        ValueError,
        r"for the same predictions. Got the shapes \(2, 4\), \(2, 3\) and \(2,\). Use a teacher",
    ),
    (
        lambda: hidden_states_loss([torch.ones(1, 5, 4)], [torch.ones(1, 5, 4)], torch.ones(1).bool()),
        ValueError,
        r"one vector per label. Got 1 of shape \[\(1, 5, 4\)\] .* Use distillation=",
    ),
    (lambda: FreezingCallback("thaw"), ValueError, "Expected `mode` 'freeze' or 'unfreeze', .* Got 'thaw' and 1"),
    (lambda: freeze(llama(), sharded=True), ValueError, "Frozen blocks have no gradients. .* `ddp_find_unused_param"),
    (
        lambda: freeze(llama().requires_grad_(False)),
        ValueError,
        "None of the 3 blocks of this LlamaForCausalLM has a trained",
    ),
    (guarded_vandalism, RuntimeError, "'model.layers.2.mlp.up_proj' lost zeros"),
    (
        lambda: _compare({"a": 3}, {"a": 4}),
        ValueError,
        "masks of the checkpoint and of the model differ in 1 weights, the first of which is 'a'",
    ),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words):
    with pytest.raises(error, match=words):
        refused()


def raise_statements(package):
    """(path, first line, last line) of every `raise` that makes an error; a bare re-raise makes none."""
    return {
        (path.relative_to(package), node.lineno, node.end_lineno)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }


def test_no_refusal_goes_untested():
    package = Path(peft_sparse.__file__).parent
    reached = set()
    for refused, error, _ in REFUSALS:
        with pytest.raises(error) as caught:
            refused()
        frames = traceback.extract_tb(caught.value.__traceback__)
        last = [frame for frame in frames if Path(frame.filename).is_relative_to(package)][-1]
        reached.add((Path(last.filename).relative_to(package), last.lineno))
    missed = [
        f"{name}:{first}"
        for name, first, end in raise_statements(package)
        if not any(name == file and first <= line <= end for file, line in reached)
    ]
    assert missed == []

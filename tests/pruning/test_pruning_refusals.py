"""Every refusal of `pruning/`, with its words."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import Criterion, Magnitude, SparseGPT, plan_pruning, prune, prune_checkpoint, sparsity
from peft_sparse.model.blocks import find_blocks
from peft_sparse.model.weights import WeightView
from peft_sparse.pruning import checkpoint_model, streamed_model
from peft_sparse.pruning.allocation import allocate
from peft_sparse.pruning.checkpoint_layout import Plan, Step
from peft_sparse.pruning.choices import chosen
from peft_sparse.pruning.criteria import CRITERIA
from peft_sparse.pruning.least_squares import masked_least_squares
from peft_sparse.pruning.patterns import SemiStructured, Unstructured, parse_pattern
from peft_sparse.pruning.refinement import find_refinement
from peft_sparse.pruning.report import PruningReport
from peft_sparse.pruning.sparsegpt import sparsegpt
from peft_sparse.pruning.streamed_model import StreamedModel

from conftest import tiny
from refusing import TOKENS, adapted, arguments, llama, merged


def streamed(model=None, edit=None, original=False, **options):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        (model or llama()).save_pretrained(source, save_original_format=original)
        if edit is not None:
            edit(Path(folder))
        prune_checkpoint(source, Path(folder) / "pruned", 0.5, **options)


def streamed_by_two():
    with mock.patch.object(streamed_model, "PartialState", return_value=SimpleNamespace(num_processes=2)):
        streamed()


def occupy(folder):
    (folder / "pruned").mkdir()
    (folder / "pruned" / "something").touch()


def cut_short(folder):
    path = folder / "source" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def remove_weights(folder):
    (folder / "source" / "model.safetensors").unlink()


def unwritable():
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        denied = mock.patch.object(streamed_model, "TemporaryDirectory", side_effect=PermissionError("denied"))
        with denied:
            prune_checkpoint(folder, Path(folder) / "pruned", 0.5)


def index(text):
    """Replace the weights by an index."""

    def edit(folder):
        remove_weights(folder)
        (folder / "source" / "model.safetensors.index.json").write_text(text)

    return edit


def name_others(folder):
    path = folder / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "elsewhere"}))


def forget_the_class(folder):
    LlamaConfig().save_pretrained(folder / "source")


def configured(**settings):
    def edit(folder):
        path = folder / "source" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return edit


def rewritten(change):
    """Change the tensors of the checkpoint."""

    def edit(folder):
        path = folder / "source" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def lose_an_expert(tensors):
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]


def quantise(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)


def share_between_blocks():
    model = llama()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with mock.patch.object(checkpoint_model, "empty_model", return_value=model):
        streamed()


def convert_across_blocks():
    step = Step("", None, {"stacked": ""}, {f"model.layers.{index}.mlp.up_proj.weight": "" for index in range(2)})
    model = llama()
    StreamedModel._by_part(SimpleNamespace(blocks=find_blocks(model)), [step], of_results=True)


def lose_a_name():
    with mock.patch.object(
        streamed_model, "saving_plan", return_value=Plan([], {"lm_head.wait": torch.empty(61, 16)})
    ):
        streamed()


def offloaded_with_gradients():
    prune(cpu_offload(llama()), 0.5, criterion="gblm", calibration=TOKENS)


def without_entries():
    """Layers whose weights a compaction has cut to nothing."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(0, 4))
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(layer)])})


def allocated(method, share=0.5, **options):
    """Two weights of 16 entries, one of them with 4 zeros."""
    layers = {name: nn.Linear(4, 4) for name in ("one", "two")}
    layers["one"].weight.data[0] = 0
    return allocate(method, {name: WeightView(layer) for name, layer in layers.items()}, share, blocks={}, **options)


def unpicturable():
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        PruningReport("magnitude", "0.5", "row", 0.5, 1.0, 1, ()).plot("unused")


def nan_hessian():
    masked_least_squares(torch.ones(2, 2), torch.eye(2).bool(), torch.full((2, 2), torch.nan))


def reaching_into_a_block():
    """A model on disk that reads a weight of a block without calling the block."""
    llama().save_pretrained("dense")
    own = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        float(self.model.layers[1].mlp.up_proj.weight.sum())
        return own(self, *args, **kwargs)

    with mock.patch.object(LlamaForCausalLM, "forward", forward):
        prune_checkpoint("dense", "sparse", 0.5, TOKENS, criterion="wanda")


REFUSALS = [
    (
        reaching_into_a_block,
        ValueError,
        "The model uses weights of a block outside of calls of this block, .* Load the model and use `prune`",
    ),
    (lambda: Unstructured(1.0), ValueError, r"`sparsity` must be in \[0, 1\), got 1.0. Use 0.5"),
    (lambda: sparsity(without_entries()), ValueError, "Expected weights with entries, got .* Name other layers"),
    (lambda: parse_pattern(-0.1), ValueError, r"must be in \[0, 1\), got -0.1"),
    (lambda: parse_pattern(float("nan")), ValueError, r"must be in \[0, 1\), got nan"),
    (lambda: prune(llama(), sparsity="half"), ValueError, r"`sparsity` must be in \[0, 1\), got 'half'. Use 0.5"),
    (
        lambda: prune(llama(), 0.5, TOKENS, criterion=lambda weight, known: weight.abs() * known.input_norm.sqrt_()),
        ValueError,
        "The criterion wrote into the statistics of .*q_proj', .* Use operations that return a new tensor",
    ),
    (lambda: prune(llama(), 0.5, criterion=Magnitude), ValueError, "`criterion` must be one of .* got <class"),
    (lambda: SemiStructured(2.0, 4), ValueError, "needs 1 <= n <= m, got 2.0:4"),
    (lambda: SemiStructured(5, 4), ValueError, "needs 1 <= n <= m, got 5:4. Use 2:4"),
    (lambda: parse_pattern("0:4"), ValueError, "needs 1 <= n <= m, got 0:4"),
    (
        lambda: prune(llama(), TOKENS),
        TypeError,
        "A pattern is a sparsity .* type Tensor. The order of the first arguments",
    ),
    (lambda: parse_pattern("half"), ValueError, "A pattern is a sparsity such as 0.5 .* got 'half'"),
    (
        lambda: find_refinement("swaps"),
        ValueError,
        "`refinement` must be one of 'dsnot', 'swap', or a value .* got 'swaps'",
    ),
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
        lambda: prune(llama(), 0.5, criterion=lambda weight, measured: weight.abs() * measured.input_norm),
        ValueError,
        "criterion failed at 'model.layers.0.self_attn.q_proj'.* are None: input_norm, .* say so: `Criterion",
    ),
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
        lambda: plan_pruning(LlamaConfig(), 0.5),
        ValueError,
        r"names one class in `architectures`, got \[\]. Write the name",
    ),
    (
        lambda: streamed(edit=configured(architectures=["Nothing"])),
        ValueError,
        r"name a class of transformers or a registered one, got \['Nothing'\]. Register the class",
    ),
    (
        lambda: streamed(edit=forget_the_class),
        ValueError,
        "that one of the classes .*LlamaForCausalLM, .* fits, and none has exactly its tensors. Name the class",
    ),
    (
        lambda: streamed(edit=occupy),
        ValueError,
        "pruned' not to exist, to be empty, or to hold only what a killed run left. Give another `output`",
    ),
    (
        lambda: streamed(edit=lambda folder: (folder / "pruned").touch()),
        ValueError,
        "Expected `output` to be a folder or new, got the file",
    ),
    (
        lambda: streamed(edit=lambda folder: (folder / "pruned").symlink_to(folder / "nowhere")),
        ValueError,
        "Expected `output` to be a folder or new, got the link .* to what is not there",
    ),
    (
        unwritable,
        PermissionError,
        "Nothing can be written to .*. Give another `output`",
    ),
    (lambda: prune_checkpoint(llama(), "pruned", 0.5), TypeError, "Expected `source` as the path .* got LlamaForCaus"),
    (
        lambda: streamed(edit=index("{")),
        ValueError,
        "index.json' is no index .* JSONDecodeError: .* Download it again",
    ),
    (
        lambda: streamed(edit=index('{"weight_map": {"lm_head.weight": "other.safetensors"}}')),
        ValueError,
        "index.json' names 'other.safetensors', which is not there. Download it again",
    ),
    (
        lambda: prune_checkpoint("nowhere", "pruned", 0.5),
        ValueError,
        "Expected a folder with config.json and safetensors, .* at 'nowhere'. Download .* `huggingface_hub.snapshot",
    ),
    (lambda: streamed(edit=cut_short), ValueError, "model.safetensors' is no whole safetensors file: .* Download it"),
    (lambda: streamed(edit=name_others), ValueError, "says where the weights are: 'elsewhere'. There is no such file"),
    (lambda: streamed(edit=remove_weights), ValueError, "Expected model.safetensors or model.safetensors.index.json"),
    (lambda: streamed(group="model"), ValueError, "One block at a time is in memory, .* Use `prune`"),
    (
        lambda: streamed(criterion="gblm", calibration=TOKENS),
        ValueError,
        "criteria that need gradients need the whole model",
    ),
    (
        lambda: streamed(tiny("mixtral"), rewritten(lose_an_expert), original=True),
        ValueError,
        "could not convert 'model.layers.1.block_sparse_moe.experts.0.w1.weight' \\(7 tensors\\): .* Load the model",
    ),
    (
        lambda: streamed(edit=configured(hidden_size=8)),
        ValueError,
        "'lm_head.weight' has shape \\(61, 16\\), and that of the model has \\(61, 8\\). Correct config.json",
    ),
    (
        lambda: streamed(edit=rewritten(quantise)),
        ValueError,
        "'model.layers.1.mlp.up_proj.weight' is stored as torch.int8, but .* Prune before quantising",
    ),
    (
        lambda: streamed(edit=rewritten(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))),
        ValueError,
        "no tensor for 'model.layers.1.mlp.up_proj.weight' \\(1 such parameters of Llama.*Correct `archi",
    ),
    (
        share_between_blocks,
        ValueError,
        "'model.layers.1.mlp.gate_proj.weight' is also 'model.layers.2.* Use `prune",
    ),
    (
        convert_across_blocks,
        ValueError,
        "'stacked' is converted together with tensors of 'model.layers.0' and",
    ),
    (lose_a_name, ValueError, "'lm_head.wait' would not be loaded again under .* Load the model, save it with `save_"),
    (
        offloaded_with_gradients,
        ValueError,
        "'gblm' needs gradients of all weights at once, but some are offloaded. Load the model without",
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
        "q_proj' is on the meta device, which holds no values. Load the model first",
    ),
    (lambda: arguments(sparsity=1.5), ValueError, r"must be in \[0, 1\), got 1.5"),
    (
        lambda: prune(llama(), 0.5, on_unreached="skip"),
        ValueError,
        '`on_unreached` must be "magnitude", to prune experts .* or "error", got \'skip\'',
    ),
    (
        lambda: prune(tiny("mixtral"), 0.5, TOKENS[:1, :1], criterion="wanda", group="model"),
        ValueError,
        r"No calibration token reaches .*\d such weights of experts.*, so its scores cannot be compared .* Use more",
    ),
    (nan_hessian, ValueError, "Expected a finite solution of the masked least squares, got NaN or infinity"),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSALS, ids=[words[:40] for _, _, words in REFUSALS])
def test_the_refusal_says_what_to_do(refused, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        refused()

"""Regions against the blocks they are cut from: what they compute, what belongs to them, what they leave behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from peft_sparse.calibration.activations import ActivationStore
from peft_sparse.calibration.runner import BlockRunner
from peft_sparse.model.blocks import find_stacks, is_norm
from peft_sparse.model.weights import WeightView
from peft_sparse.reconstruction.calls import STATE, StateCall, chain_of
from peft_sparse.reconstruction.division import (
    hands_on,
    regions_of_submodules,
    regions_tried,
    run_noting_values,
)
from peft_sparse.reconstruction.regions import regions_by_names, regions_of_blocks
from peft_sparse.reconstruction.streams import Window

from conftest import FAMILIES, SIZES, inputs_of, tiny


# Both parts are fed the same hidden states and added up.
PARALLEL = ("gpt_neox", "phi")
# Blocks that do not fall into two parts.
WHOLE = ("t5", "bart")
IN_PARTS = [family for family in FAMILIES if family not in WHOLE]


def lively(model):
    """Away from the initial values: norms that are 1 and biases that are 0 hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return model.eval()


def captured(model, batch, index=0):
    """Name, module, input and arguments of one block of the first stack."""
    stack = find_stacks(model)[0]
    runner = BlockRunner(model, stack, [batch])
    hidden, calls = chain_of(runner, runner.batches[0])
    with torch.no_grad():
        for block, call in list(zip(stack.values(), calls, strict=True))[:index]:
            hidden = call.made(block, hidden)
    name = list(stack)[index]
    return name, stack[name], hidden, calls[index]


def of_family(family, index=0):
    return captured(lively(tiny(family)), inputs_of(family, 3), index)


def parts_of(family, index=0):
    name, block, hidden, call = of_family(family, index)
    return block, hidden, call, regions_of_submodules(name, block, index, hidden, call)


@torch.no_grad()
def output_of(block, hidden, call):
    return call.made(block, hidden)


# -- what regions compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_PARTS)
def test_attention_and_mlp_make_up_the_block(family):
    block, hidden, call, (attention, mlp) = parts_of(family, index=1)
    whole = output_of(block, hidden, call)
    with torch.no_grad():
        first = attention(hidden, [call])
        second = mlp(hidden, [call]) + first - hidden if family in PARALLEL else mlp(first, [call])
    assert (attention.joins, mlp.joins) == (("input", "output") if family in PARALLEL else (None, None))
    assert not torch.allclose(first, whole, rtol=1e-3)
    torch.testing.assert_close(second, whole)


@torch.no_grad()
def test_each_part_is_its_sublayer_with_the_residual_around_it():
    block, hidden, call, (attention, mlp) = parts_of("llama")
    by_hand = hidden + block.self_attn(block.input_layernorm(hidden), *call.args[1:], **call.kwargs)[0]
    torch.testing.assert_close(attention(hidden, [call]), by_hand)
    torch.testing.assert_close(mlp(hidden, [call]), hidden + block.mlp(block.post_attention_layernorm(hidden)))


def test_a_sequential_residual_is_told_from_a_parallel_one():
    config = GPTNeoXConfig(**SIZES, intermediate_size=24, use_parallel_residual=False)
    name, block, hidden, call = captured(lively(GPTNeoXForCausalLM(config)), inputs_of("gpt_neox", 3))
    parts = regions_of_submodules(name, block, 0, hidden, call)
    assert [part.joins for part in parts] == [None, None]


@pytest.mark.parametrize("family", IN_PARTS)
def test_the_part_that_is_not_in_turn_computes_nothing(family):
    block, hidden, call, parts = parts_of(family)
    ran = []
    for key, module in block.named_modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            module.register_forward_pre_hook(lambda module, args, key=key: ran.append(key))
    output_of(block, hidden, call)
    both, norms = set(ran), {key for key, module in block.named_modules() if is_norm(module)}
    seen = []
    for part in parts:
        ran.clear()
        with torch.no_grad():
            part(hidden, [call])
        seen.append({key for key in ran if block.get_submodule(key) not in part.silenced} - norms)
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == both - norms


def test_blocks_in_a_row_are_one_region(llama, tokens):
    stack = find_stacks(llama)[0]
    runner = BlockRunner(llama, stack, [{"input_ids": tokens}])
    hidden, calls = chain_of(runner, runner.batches[0])
    (region,) = regions_of_blocks(dict(list(stack.items())[1:]), 1)
    with torch.no_grad():
        expected = hidden
        for block, call in list(zip(stack.values(), calls, strict=True))[1:]:
            expected = output_of(block, expected, call)
        assert torch.equal(region(hidden, calls[1:]), expected)
    assert (region.name, region.first) == ("model.layers.1 .. 2", 1)
    assert list(region.parameters) == [n for n, _ in llama.named_parameters() if ".1." in n or ".2." in n]
    (single,) = regions_of_blocks({"model.layers.1": stack["model.layers.1"]}, 1)
    assert single.name == "model.layers.1"


# -- what belongs to them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_PARTS)
def test_every_parameter_of_a_block_belongs_to_one_part_and_what_both_use_to_none(family):
    block, hidden, call, parts = parts_of(family)
    names = [set(part.parameters) for part in parts]
    every = {f"{next(iter(parts[0].blocks))}.{key}" for key, _ in block.named_parameters()}
    shared = {name for name in every if family == "phi" and ".input_layernorm." in name}
    assert not names[0] & names[1]
    assert names[0] | names[1] == every - shared
    layers = {n for n in names[0] if any(n.endswith(f"{kind}.weight") for kind in ("proj", "attn", "dense"))}
    assert all("attn" in name or "attention" in name for name in layers)


@pytest.mark.parametrize("family", [family for family in IN_PARTS if family not in PARALLEL])
def test_a_part_depends_on_its_own_parameters_alone(family):
    block, hidden, call, parts = parts_of(family)
    for part, other in (parts, parts[::-1]):
        with torch.no_grad():
            before = part(hidden, [call])
            kept = [parameter.clone() for parameter in other.parameters.values()]
            for parameter in other.parameters.values():
                parameter.add_(1.0)
            assert torch.equal(part(hidden, [call]), before)
            for parameter, value in zip(other.parameters.values(), kept, strict=True):
                parameter.copy_(value)


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", {"input_layernorm"}, {"post_attention_layernorm"}),
        (
            "gemma2",
            {"input_layernorm", "post_attention_layernorm"},
            {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
        ),
        ("qwen3", {"input_layernorm", "self_attn.q_norm", "self_attn.k_norm"}, {"post_attention_layernorm"}),
        ("gpt_neox", {"input_layernorm"}, {"post_attention_layernorm"}),
        ("opt", {"self_attn_layer_norm"}, {"final_layer_norm"}),
        ("phi", set(), set()),
        ("vit", {"layernorm_before"}, {"layernorm_after"}),
    ],
)
def test_norms_go_with_the_part_they_feed(family, attention, mlp):
    block, _, _, parts = parts_of(family)
    norms = {id(module.weight): key for key, module in block.named_modules() if is_norm(module)}
    found = [{norms[id(p)] for p in part.parameters.values() if id(p) in norms} for part in parts]
    assert found == [attention, mlp]


def test_queries_belong_to_the_attention_where_one_token_hides_them():
    """The softmax over one token is 1 whatever the query: its gradient is zero."""
    name, block, hidden, call = captured(lively(tiny("llama")), {"input_ids": torch.tensor([[3]])})
    attention, mlp = regions_of_submodules(name, block, 0, hidden, call)
    assert f"{name}.self_attn.q_proj.weight" in attention.parameters
    assert f"{name}.self_attn.q_proj.weight" not in mlp.parameters


def test_a_layer_that_did_not_run_belongs_to_the_mlp(llama, tokens):
    """An expert, perhaps, that the router sent no token of the first batch to."""
    llama.model.layers[0].mlp.idle = nn.Linear(4, 4)
    name, block, hidden, call = captured(llama, {"input_ids": tokens})
    _, mlp = regions_of_submodules(name, block, 0, hidden, call)
    assert "model.layers.0.mlp.idle.weight" in mlp.parameters


def test_integers_in_a_block_are_no_obstacle(llama, tokens):
    """As a quantised layer that is not pruned holds them."""
    llama.model.layers[0].mlp.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    name, block, hidden, call = captured(llama, {"input_ids": tokens})
    regions_of_submodules(name, block, 0, hidden, call)
    assert not block.mlp.codes.requires_grad


def test_position_biases_that_are_handed_on_belong_to_no_region():
    """T5's first block makes them for all others, which have been given theirs already."""
    name, block, _, _ = of_family("t5")
    (region,) = regions_of_blocks({name: block}, 0)
    assert f"{name}.layer.0.SelfAttention.q.weight" in region.parameters
    assert not any("relative_attention_bias" in key for key in region.parameters)


def test_a_region_holds_its_parameters_and_nothing_equal_to_them():
    block, _, _, (attention, mlp) = parts_of("llama")
    layer = block.self_attn.q_proj
    weights = {"own": WeightView(layer), "equal": WeightView(copy.deepcopy(layer))}
    assert list(attention.among(weights)) == ["own"]
    assert mlp.among(weights) == {}


# -- blocks that are not made of two parts --------------------------------------------------------------------------


def bart():
    return lively(tiny("bart")), inputs_of("bart", 3)


def bert():
    sizes = SIZES | {"num_hidden_layers": 2, "intermediate_size": 24}
    return lively(BertModel(BertConfig(**sizes))), inputs_of("llama", 3)


def post_norm_opt():
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False)
    return lively(OPTForCausalLM(config)), inputs_of("opt", 3)


@pytest.mark.parametrize("post_norm", [bart, bert, post_norm_opt])
def test_a_block_with_a_norm_after_the_residual_is_one_region(post_norm):
    model, batch = post_norm()
    name, block, hidden, call = captured(model, batch)
    (region,) = regions_of_submodules(name, block, 0, hidden, call)
    assert region.name == name
    assert "computes something else, as where a norm follows the residual" in region.whole
    assert list(region.parameters) == [f"{name}.{key}" for key, _ in block.named_parameters()]
    assert_nothing_left(block)


def test_a_block_without_both_parts_is_one_region():
    name, block, hidden, call = of_family("t5")
    (region,) = regions_of_submodules(name, block, 0, hidden, call)
    assert (region.name, region.whole) == (name, "no attention was found in it")
    only_mlp = nn.Sequential(nn.Linear(4, 4))
    (region,) = regions_of_submodules("h.0", only_mlp, 0, torch.ones(1, 2, 4), StateCall((STATE,), {}))
    assert list(region.parameters) == ["h.0.0.weight", "h.0.0.bias"]


# Of a block that takes nothing but hidden states, and may write into them.
CALL = StateCall((STATE,), {}, writes=True)


class Mixing(nn.Module):
    """An attention of few words: every token gets the mean of all, after a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, hidden, residual=0):
        return self.layer(hidden).mean(1, keepdim=True).expand_as(hidden) + residual


class Block(nn.Module):
    """A block whose attention is used in the way of its subclass."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Mixing(), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, hidden):
        hidden = self.attended(hidden, self.norms[0](hidden))
        return hidden + self.mlp(self.norms[1](hidden))


class Plain(Block):
    def attended(self, hidden, normed):
        return hidden + self.attn(normed)


class Named(Block):
    """Calls its attention with keywords that no other block uses."""

    def attended(self, hidden, normed):
        return hidden + self.attn(hidden=normed)


class InPlace(Block):
    def forward(self, hidden):
        hidden += self.attn(self.norms[0](hidden))
        hidden += self.mlp(self.norms[1](hidden))
        return hidden


class Several(Block):
    """Two attentions, as a decoder has."""

    def __init__(self):
        super().__init__()
        self.cross_attn = Mixing()

    def attended(self, hidden, normed):
        hidden = hidden + self.attn(normed)
        return hidden + self.cross_attn(hidden)


class Indexed(Block):
    """An attention with a layer that only chooses."""

    def __init__(self):
        super().__init__()
        self.attn.indexer = nn.Linear(8, 8)

    def attended(self, hidden, normed):
        chosen = self.attn.indexer(normed).argmax(-1, keepdim=True)
        return hidden + self.attn(normed * (chosen > 3)) + self.attn(normed)


class ResidualInside(Block):
    def attended(self, hidden, normed):
        return self.attn(normed, hidden)


class OfOtherShape(Block):
    def __init__(self):
        super().__init__()
        self.attn = nn.Sequential(nn.Linear(8, 4), nn.Unflatten(-1, (2, 2)))

    def attended(self, hidden, normed):
        return hidden + self.attn(normed).sum(-1).repeat(1, 1, 4)


class MixingAsADict(Mixing):
    def forward(self, hidden):
        return {"states": super().forward(hidden)}


class OfADict(Block):
    def __init__(self):
        super().__init__()
        self.attn = MixingAsADict()

    def attended(self, hidden, normed):
        return hidden + self.attn(normed)["states"]


class MixingAsAList(Mixing):
    def forward(self, hidden):
        return [super().forward(hidden), []]


class OfAList(Block):
    def __init__(self):
        super().__init__()
        self.attn = MixingAsAList()

    def attended(self, hidden, normed):
        states, more = self.attn(normed)
        return hidden + states + len([0, *more][1:])


class Sharing(Block):
    """One matrix in both parts."""

    def __init__(self):
        super().__init__()
        self.attn.layer.weight = nn.Parameter(torch.randn(8, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.mlp[0].weight = self.attn.layer.weight

    def attended(self, hidden, normed):
        return hidden + self.attn(normed)


@pytest.mark.parametrize("kind", [Plain, Named, InPlace, Several, Indexed])
def test_blocks_of_many_kinds_fall_into_parts(kind):
    block, hidden = lively(kind()), torch.randn(2, 5, 8)
    kept = hidden.clone()
    attention, mlp = regions_of_submodules("b", block, 0, hidden, CALL)
    with torch.no_grad():
        second = mlp(attention(hidden, [CALL]), [CALL])
        assert torch.equal(hidden, kept)
        torch.testing.assert_close(second, block(kept))
    names = {key.split(".")[1] for key in attention.parameters}
    assert names == {"attn", "norms"} | ({"cross_attn"} if kind is Several else set())
    assert not set(attention.parameters) & set(mlp.parameters)
    assert len(attention.parameters) + len(mlp.parameters) == len(list(block.parameters()))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (ResidualInside, "its attention followed by its MLP computes something else"),
        (OfOtherShape, "its parts do not run apart from each other"),
        (OfADict, "its parts do not run apart from each other"),
        (OfAList, "its parts do not run apart from each other"),
        (Sharing, "its attention and its MLP both use 'b.attn.layer.weight'"),
    ],
)
def test_blocks_of_many_kinds_are_fitted_whole_and_say_why(kind, why):
    block = lively(kind())
    (region,) = regions_of_submodules("b", block, 0, torch.randn(2, 5, 8), CALL)
    assert why in region.whole
    assert len(region.parameters) == len(list(block.parameters()))
    assert_nothing_left(block)


def test_an_error_of_the_block_itself_is_raised():
    block = lively(Plain())

    def fail(*args):
        raise ArithmeticError("the block's own words")

    block.mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="the block's own words"):
        regions_of_submodules("b", block, 0, torch.randn(2, 5, 8), CALL)


@pytest.mark.parametrize("size", ["submodule", "block"])
def test_what_a_block_writes_into_its_arguments_does_not_reach_the_caller(size):
    block, hidden = lively(InPlace()), torch.randn(2, 5, 8)
    kept = hidden.clone()
    for region in regions_tried({"b": block}, 0, size, hidden, [CALL]):
        assert region.writes
        with region.recording(), torch.enable_grad():
            region(hidden, [CALL]).square().sum().backward()
        assert torch.equal(hidden, kept)
        assert all(parameter.grad is not None for parameter in region.parameters.values())


# -- what they leave behind -----------------------------------------------------------------------------------------


def assert_nothing_left(block):
    for name, module in block.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert all(parameter.grad is None for parameter in block.parameters())


@pytest.mark.parametrize("family", IN_PARTS)
def test_a_block_is_left_as_it_was(family):
    name, block, hidden, call = of_family(family)
    frozen = next(iter(block.parameters()))
    frozen.requires_grad_(False)
    expected = {key: (value.clone(), value.requires_grad) for key, value in block.named_parameters()}
    for part in regions_of_submodules(name, block, 0, hidden, call):
        part(hidden, [call])
    assert_nothing_left(block)
    for key, value in block.named_parameters():
        assert torch.equal(value, expected[key][0]), key
        assert value.requires_grad == expected[key][1], key


def test_a_modules_own_forward_comes_back_also_after_an_error():
    block, hidden, call, (attention, _) = parts_of("llama")
    own = block.mlp.forward
    block.mlp.forward = lambda *args: own(*args)
    patched = block.mlp.__dict__["forward"]
    attention(hidden, [call])
    assert block.mlp.__dict__["forward"] is patched
    with pytest.raises(TypeError):
        attention(hidden, [StateCall((STATE,), {"position_embeddings": None})])
    assert block.mlp.__dict__["forward"] is patched


@torch.no_grad()
def test_regions_are_found_where_gradients_are_off():
    _, _, _, (attention, mlp) = parts_of("llama")
    assert attention.parameters
    assert mlp.parameters


def test_half_precision_does_not_hide_the_parts():
    model = lively(tiny("llama")).bfloat16()
    name, block, hidden, call = captured(model, inputs_of("llama", 3))
    assert len(regions_of_submodules(name, block, 0, hidden, call)) == 2


# -- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi", "mixtral", "t5"])
def test_regions_by_names_compute_what_those_that_were_tried_compute(family):
    """What plans are made of: the same modules are silent, and no parameter that is trained is missing."""
    name, block, hidden, call = of_family(family)
    tried = regions_of_submodules(name, block, 0, hidden, call)
    returned = {module: values for region in tried for module, values in region.silenced.items()}
    named = regions_by_names({name: block}, 0, "submodule", returned)
    assert [region.name for region in named] == [region.name for region in tried]
    assert [region.silenced for region in named] == [region.silenced for region in tried]
    assert all(one.parameters.keys() >= other.parameters.keys() for one, other in zip(named, tried, strict=True))
    assert [region.name for region in regions_by_names({name: block}, 0, "block", {})] == [name]


@pytest.mark.parametrize("model", [*IN_PARTS, bart, bert, post_norm_opt])
def test_without_values_of_its_weights_a_block_tells_whether_it_can_be_divided(model):
    whole_model, batch = (lively(tiny(model)), inputs_of(model, 3)) if isinstance(model, str) else model()
    name, block, hidden, call = captured(whole_model, batch)
    (whole,) = regions_of_blocks({name: block}, 0)
    _, returned = run_noting_values(whole, hidden, call)
    halves = regions_by_names({name: block.to("meta")}, 0, "submodule", returned)
    assert hands_on(name, block, halves, hidden, call) == isinstance(model, str)
    assert all(parameter.is_meta for parameter in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_window_receives_half_precision_in_float32_and_all_else_as_it_is(dtype):
    value, mask, wide = torch.randn(3).to(dtype), torch.tensor([True]), torch.ones(2, dtype=torch.float64)
    kwargs = {"position_embeddings": (value, value), "mask": mask, "wide": wide, "mode": "x"}
    calls = [[StateCall((value, 3, STATE), kwargs)]]
    stream = SimpleNamespace(batches=[None], calls=calls, store=ActivationStore("device"))
    (found,) = Window(stream, 0, {"block": nn.Linear(1, 1)}).calls(0)
    assert torch.equal(found.args[0], value.float())
    assert [v.dtype for v in (found.args[0], *found.kwargs["position_embeddings"])] == [torch.float32] * 3
    assert found.args[1:] == (3, STATE)
    assert found.kwargs["mask"] is mask
    assert found.kwargs["wide"] is wide
    assert found.kwargs["mode"] == "x"

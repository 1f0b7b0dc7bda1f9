"""Models that use their blocks in every way: each is measured as its own passes would be, or refused untouched."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralForCausalLM,
    ReformerConfig,
    ReformerModel,
)

from peft_sparse import prune
from peft_sparse.model.blocks import find_blocks, prunable_weights

from checks import assert_same_weights
from conftest import tiny


class Block(nn.Module):
    """A residual block, whose ways of taking and returning its state are those of `way`."""

    def __init__(self, way="plain"):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.way = way

    def change(self, x):
        return self.down(self.up(self.norm(x)).relu())

    def forward(self, x, other=None, shared=None):
        if self.way == "in place":
            x += self.change(x)
            return x
        if self.way == "keyword layers":
            return x + self.down(input=self.up(input=self.norm(x)).relu())
        if self.way == "dict":
            return {"steps": 1, "x": x + self.change(x)}
        if self.way == "object":
            x.state = x.state + self.change(x.state)
            return x
        if self.way == "new object":
            return SimpleNamespace(state=x.state + self.change(x.state))
        if self.way == "two streams":
            return self.change(x) + other, x + other
        if self.way == "shared":
            # The first block leaves what the others read.
            shared.setdefault("first", self.change(x))
            return x + self.change(shared["first"] + x)
        return x + self.change(x)


class Net(nn.Module):
    """Runs blocks as `run` says, on embeddings of token ids."""

    def __init__(self, run, way="plain", count=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(Block(way) for _ in range(count))
        self.run = run

    def forward(self, input_ids):
        return self.run(self.layers, self.embed(input_ids))


def in_order(*numbers):
    def run(layers, x):
        for number in numbers:
            x = layers[number](x)
        return x

    return run


def by_keyword(layers, x):
    for layer in layers:
        x = layer(x=x)
    return x


def of_dicts(layers, x):
    for layer in layers:
        x = layer(x)["x"]
    return x


def two_streams(layers, x):
    other = x * 0.5
    for layer in layers:
        x, other = layer(x, other=other)
    return x


def through_a_dict(layers, x):
    shared = {}
    for layer in layers:
        x = layer(x, shared=shared)
    return x


def two_texts(layers, x):
    first, second = x.chunk(2)
    for layer in layers:
        first = layer(first)
    for layer in layers:
        second = layer(second)
    return first @ second.mT


def copying(layers, x):
    for layer in layers:
        x = layer(x).clone()
    return x


def sharing(what, run):
    """A net of which the first and the last block share a layer, or two layers share a weight."""
    net = Net(run)
    first, *_, last = net.layers
    if what == "a layer":
        last.up = first.up
    elif what == "a weight":
        last.up.weight = first.up.weight
    return net


NETS = {
    "in order": Net(in_order(0, 1, 2)),
    "backwards": Net(in_order(2, 1, 0)),
    "each twice": Net(in_order(0, 0, 1, 1, 2, 2)),
    "in a loop": Net(in_order(0, 1, 2, 0, 1, 2)),
    "one left out": Net(in_order(0, 2)),
    "in place": Net(in_order(0, 1, 2), "in place"),
    "by keyword": Net(by_keyword),
    "keyword layers": Net(in_order(0, 1, 2), "keyword layers"),
    "dicts": Net(of_dicts, "dict"),
    "two streams": Net(two_streams, "two streams"),
    "shared through a dict": Net(through_a_dict, "shared"),
    "two texts": Net(two_texts),
    "copies": Net(copying),
    "a layer of two blocks": sharing("a layer", in_order(0, 1, 2)),
    "a weight of two blocks": sharing("a weight", in_order(0, 1, 2)),
    "a weight of two blocks, in a loop": sharing("a weight", in_order(0, 1, 2, 0, 1, 2)),
}


class Later(nn.Module):
    """Registers the stack that runs last before the one that runs first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.last, self.first = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids):
        return in_order(0, 1)(self.last, self.norm(in_order(0, 1)(self.first, self.embed(input_ids))))


NETS["stacks registered in another order"] = Later()


def tokens(seed=0, rows=6):
    return torch.randint(0, 32, (rows, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def pruned_by_full_passes(model, batches):
    """Prune by Wanda to 50 % per row, block by block in the order of the model, by hooks on its own passes."""
    blocks, order = find_blocks(model), []
    hooks = [b.register_forward_pre_hook(lambda m, a, n=n: order.append(n)) for n, b in blocks.items()]
    model(**batches[0])
    for hook in hooks:
        hook.remove()
    for block in dict.fromkeys(order):
        layers = {n: w.layer for n, w in prunable_weights(model).items() if n.startswith(f"{block}.")}
        squares = dict.fromkeys(layers, 0)

        def add(module, args, kwargs, name, squares=squares):
            inputs = args[0] if args else kwargs["input"]
            squares[name] = squares[name] + inputs.flatten(0, -2).square().sum(0)

        with contextlib.ExitStack() as undo:
            for name, layer in layers.items():
                hook = lambda m, a, k, name=name: add(m, a, k, name)  # noqa: E731
                for user in (m for m in model.modules() if getattr(m, "weight", None) is layer.weight):
                    undo.callback(user.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for batch in batches:
                model(**batch)
        for name, layer in layers.items():
            scores = layer.weight.abs() * squares[name].sqrt()
            lowest = scores.argsort(dim=1, stable=True)[:, : layer.in_features // 2]
            layer.weight.scatter_(1, lowest, 0)
    return model


@pytest.mark.parametrize("name", NETS)
def test_blocks_are_measured_as_passes_of_the_model_would(name):
    net = NETS[name].eval()
    start = {key: value.clone() for key, value in net.state_dict().items()}
    batches = [{"input_ids": tokens(0)}, {"input_ids": tokens(1)}]
    expected = {k: v.clone() for k, v in pruned_by_full_passes(net, batches).state_dict().items()}
    net.load_state_dict(start)
    unused = ["1.up", "1.down"] if name == "one left out" else None
    for activations in ("device", "disk"):
        prune(net, 0.5, batches, criterion="wanda", exclude_modules=unused, activations=activations)
        for key, value in net.state_dict().items():
            assert torch.equal(value, expected[key]), (key, activations)
        net.load_state_dict(start)


FAMILIES = {
    "ALBERT": lambda: AlbertModel(
        AlbertConfig(
            vocab_size=32, embedding_size=8, hidden_size=16, num_hidden_layers=4, num_hidden_groups=2,
            num_attention_heads=2, intermediate_size=24,
        )
    ),
    "Reformer": lambda: ReformerModel(
        ReformerConfig(
            vocab_size=32, hidden_size=16, attn_layers=["local"] * 2, num_attention_heads=2, attention_head_size=8,
            feed_forward_size=24, local_attn_chunk_length=4, axial_pos_shape=[2, 4], axial_pos_embds_dim=[8, 8],
            max_position_embeddings=8,
        )
    ),
    "Gemma 3n": lambda: Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=32, vocab_size_per_layer_input=32, hidden_size=16, hidden_size_per_layer_input=4,
            intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            num_kv_shared_layers=2, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=None,
            layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_share_hand_on_or_repeat_are_pruned_as_by_full_passes(family):
    torch.manual_seed(0)
    model, other = FAMILIES[family]().eval(), FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    other.load_state_dict(model.state_dict())
    batches = [{"input_ids": torch.randint(3, 32, (3, 8))} for _ in range(2)]
    prune(model, 0.5, batches, criterion="wanda")
    pruned_by_full_passes(other, batches)
    assert_same_weights(model, other)


def test_what_a_model_collects_inside_its_blocks_is_not_missed():
    config = copy.deepcopy(tiny("mixtral").config)
    config.output_router_logits = True
    batch = {"input_ids": tokens() % 32, "labels": tokens() % 32}
    torch.manual_seed(0)
    model, other = MixtralForCausalLM(config).eval(), tiny("mixtral")
    other.load_state_dict(model.state_dict())
    # The loss that balances the experts needs the logits of all routers.
    assert model(**batch).aux_loss is not None
    for net in (model, other):
        prune(net, 0.5, [batch] * 2, criterion="wanda")
    assert_same_weights(model, other)


# -- layers whose weight is used without calling them ---------------------------------------------------------------


STATE_SPACE = {
    "Mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    ),
    "Jamba": lambda: JambaForCausalLM(
        JambaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=8,
            expert_layer_offset=7, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", STATE_SPACE)
def test_a_layer_that_is_not_called_is_measured_by_its_products(family):
    model, found = STATE_SPACE[family]().eval(), []
    name = next(name for name in prunable_weights(model) if name.endswith("dt_proj"))
    before, batch = model.get_submodule(name).weight.clone(), {"input_ids": torch.randint(3, 32, (2, 6))}
    # dt_proj gets a part of the outputs of x_proj, in Jamba after a norm.
    mixer, seen = model.get_submodule(name.rpartition(".")[0]), []
    part = getattr(mixer, "dt_layernorm", mixer.x_proj)
    hook = part.register_forward_hook(lambda m, a, output: seen.append(output[..., : before.shape[1]]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    keep = lambda w, s: (found.append(s), w.abs())[1]  # noqa: E731
    prune(model, 0.5, [batch], criterion=keep, target_modules=[name])
    torch.testing.assert_close(found[0].input_norm, seen[0].flatten(0, -2).norm(dim=0))
    assert found[0].tokens == 12


# -- refusals, before anything is changed ---------------------------------------------------------------------------


def adding(layers, x):
    for layer in layers:
        x = layer(x) + 1
    return x


def adding_in_place(layers, x):
    for layer in layers:
        x = layer(x).add_(1)
    return x


def with_a_mean(layers, x):
    for layer in layers:
        x = layer(x, other=x.mean(-1))
    return x


def through_an_object():
    """Blocks take their state from an object, and put it there or into a new one."""

    def run(layers, x):
        holder = SimpleNamespace(state=x)
        for layer in layers:
            holder = layer(holder)
        return holder.state

    return run


def by_value():
    net = Net(None)
    with torch.no_grad():
        limit = net.layers[0](net.embed(tokens())).norm() * 1.005

    def run(layers, x):
        x = layers[0](x)
        return layers[1](x) if x.norm() < limit else layers[2](x)

    net.run = run
    return net


def reaching_in(layers, x):
    for layer in layers:
        x = layer(x)
    return layers[0].up(x)


class Remembering(Block):
    """Adds what it was given before."""

    last = 0

    def forward(self, x):
        before, self.last = self.last, x
        return x + self.change(x) + before


def remembering():
    net = Net(in_order(0, 1, 2))
    net.layers[1] = Remembering()
    return net


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Net(adding), "Between 'layers.0' and 'layers.1' the model changes the hidden states"),
        (lambda: Net(adding_in_place), "Between 'layers.0' and 'layers.1' the model changes the hidden states"),
        (lambda: Net(with_a_mean), "computes something from them that 'layers.1' receives"),
        (by_value, "which blocks run depends on the hidden states"),
        (lambda: Net(reaching_in), "also uses this layer outside of its block"),
        (lambda: Net(through_an_object(), "object"), "receives beside the hidden states depends on what ear"),
        (lambda: Net(through_an_object(), "new object"), "'layers.0' returns states within an object that is"),
        (lambda: sharing("a weight", in_order(2, 1, 0)), "'layers.0.up' is also used by block 'layers.2'"),
        (remembering, "Called alone, 'layers.1' returns something else than within the model"),
        (
            lambda: Net(in_order(0, 2)),
            r"multiplies 'layers.1.down' and 1 more .* `exclude_modules=\['1.down', '1.up'\]`",
        ),
    ],
)
def test_what_blocks_alone_would_miss_is_refused_and_nothing_is_changed(make, words):
    net = make().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        prune(net, 0.5, [{"input_ids": tokens()}], criterion="wanda")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_a_refusal_advises_what_works():
    net = Net(in_order(0, 2)).eval()
    report = prune(net, 0.5, [{"input_ids": tokens()}], criterion="wanda", exclude_modules=["1.down", "1.up"])
    assert [w.name for w in report.weights] == ["layers.0.up", "layers.0.down", "layers.2.up", "layers.2.down"]

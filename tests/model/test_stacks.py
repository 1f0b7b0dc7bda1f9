"""Where the blocks of a model are, in every container, and what sits in a list but is no block."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_sparse import prune, sparsity
from peft_sparse.model.blocks import find_blocks, find_stacks, prunable_weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


class Stage(nn.ModuleList):
    """A list that is called, so that it is a block itself."""

    def forward(self, hidden):
        for block in self:
            hidden = block(hidden)
        return hidden


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 4, 4)


class Model(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def stacks_of(**children):
    return [list(stack) for stack in find_stacks(Model(**children))]


CONTAINERS = {
    "list": nn.ModuleList,
    "dict": lambda entries: nn.ModuleDict({f"b{i}": entry for i, entry in enumerate(entries)}),
    "sequence": lambda entries: nn.Sequential(*entries),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_blocks_are_found_in_every_container(kind):
    keys = ["b0", "b2"] if kind == "dict" else ["0", "2"]
    box = CONTAINERS[kind]([Block(), nn.Identity(), Block()])
    assert stacks_of(embed=nn.Embedding(9, 4), blocks=box) == [[f"blocks.{key}" for key in keys]]


# A list of lists: "block" is called, "identity" stands where a layer was removed, and a list is not called.
NESTED = st.recursive(
    st.sampled_from(["block", "identity"]), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8
)


def built(tree, use_dict):
    if isinstance(tree, str):
        return Block() if tree == "block" else nn.Identity()
    entries = [built(inner, not use_dict) for inner in tree]
    return CONTAINERS["dict" if use_dict else "list"](entries)


@given(st.lists(NESTED, min_size=1, max_size=4), st.booleans())
def test_all_blocks_in_lists_of_lists_are_found_and_each_list_is_a_stack(tree, use_dict):
    model = Model(layers=built(tree, use_dict))
    expected = [name for name, module in model.named_modules() if isinstance(module, Block)]
    stacks = find_stacks(model)
    assert [name for stack in stacks for name in stack] == list(find_blocks(model)) == expected
    assert all(type(block) is Block for block in find_blocks(model).values())
    assert all(len({name.rpartition(".")[0] for name in stack}) == 1 for stack in stacks)


def test_lists_of_the_parts_of_layers_are_one_stack():
    other = type("Other", (Block,), {})
    layers = nn.ModuleList(nn.ModuleList([Block(), nn.LayerNorm(4), other()]) for _ in range(2))
    assert stacks_of(layers=layers) == [["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]]


def test_the_outermost_list_wins_and_a_list_that_is_called_is_a_block():
    stages = nn.ModuleList([Stage([Block(), Block()]), Stage([Block()])])
    assert stacks_of(stages=stages) == [["stages.0", "stages.1"]]
    assert stacks_of(blocks=Stage([Block(), Block()])) == [["blocks.0", "blocks.1"]]


def test_a_sequence_of_plain_layers_is_no_list_of_blocks():
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    convs = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 4, 3))
    assert stacks_of(head=head, convs=convs, layers=nn.ModuleList([Block()])) == [["layers.0"]]


def test_blocks_of_a_sequence_may_stand_between_a_stem_and_a_head():
    stem, head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)
    features = nn.Sequential(stem, Block(), nn.Dropout(), nn.MaxPool1d(2), nn.Linear(2, 4), Block(), nn.ReLU(), head)
    # What changes hidden states between two blocks has to run with them.
    assert stacks_of(features=features) == [[f"features.{index}" for index in (1, 3, 4, 5)]]


def test_a_model_that_is_a_sequence_is_pruned_with_calibration():
    model = nn.Sequential(nn.Embedding(9, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 9))
    assert list(find_blocks(model)) == ["1", "2"]
    prune(model, 0.5)
    assert sparsity(model) == 0.5


def test_stages_of_a_resnet_are_stacks():
    stages = {f"layer{i}": nn.Sequential(Block(), Block()) for i in (1, 2)}
    assert stacks_of(conv1=nn.Conv2d(3, 4, 7), **stages, fc=nn.Linear(4, 2)) == [
        ["layer1.0", "layer1.1"],
        ["layer2.0", "layer2.1"],
    ]


@pytest.mark.parametrize(
    "entry",
    [
        PatchEmbed,
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Conv2d(4, 8, 2, stride=2)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
    ],
    ids=["class", "strided", "downsampling", "projection"],
)
def test_embeddings_and_projections_in_a_list_are_no_blocks(entry):
    assert stacks_of(embeds=nn.ModuleList([entry(), entry()]), layers=nn.ModuleList([Block()])) == [["layers.0"]]


def test_a_class_that_is_only_named_after_embeddings_is_a_block():
    layer = type("EmbeddingModelLayer", (Block,), {})
    assert stacks_of(layers=nn.ModuleList([layer()])) == [["layers.0"]]


def test_convolutions_that_do_more_than_project_are_blocks():
    entry = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU())
    assert stacks_of(layers=nn.ModuleList([entry])) == [["layers.0"]]


def test_compiled_blocks_are_looked_through():
    model = Model(layers=nn.ModuleList([torch.compile(Block(), backend="eager"), Block()]))
    model.layers[1].up = torch.compile(model.layers[1].up, backend="eager")
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]
    assert type(find_blocks(model)["layers.0"]) is Block
    assert list(prunable_weights(model)) == [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def test_a_block_that_is_registered_twice_has_its_first_name():
    shared, encoder = Block(), nn.ModuleList([Block(), Block()])
    assert stacks_of(layers=nn.ModuleList([shared, Block(), shared])) == [["layers.0", "layers.1"]]
    assert stacks_of(encoder=encoder, decoder=nn.ModuleList([encoder[1], Block()])) == [
        ["encoder.0", "encoder.1"],
        ["decoder.1"],
    ]


def segformer():
    config = transformers.SegformerConfig(
        depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def depth_anything():
    backbone = transformers.Dinov2Config(
        image_size=14, patch_size=7, hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=7, reassemble_hidden_size=8, neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config)


@pytest.mark.parametrize("make", [segformer, depth_anything])
def test_of_a_vision_model_only_the_backbone_has_blocks_and_its_patch_embeddings_are_left_alone(make):
    names = list(prunable_weights(make()))
    assert names
    assert not [name for name in names if "embed" in name or "head" in name or "neck" in name]


def test_a_head_can_be_named():
    model = segformer()
    assert list(prunable_weights(model, ["decode_head.classifier"])) == ["decode_head.classifier"]


def test_stages_are_measured_behind_the_pruned_stages_before_them():
    """A pooling between them is not missed."""
    config = transformers.FunnelConfig(vocab_size=16, block_sizes=[1, 2], d_model=8, n_head=2, d_head=4, d_inner=8)
    model = transformers.FunnelBaseModel(config).eval()
    assert [list(stack) for stack in find_stacks(model)] == [
        ["encoder.blocks.0.0"],
        ["encoder.blocks.1.0", "encoder.blocks.1.1"],
    ]
    tokens, found, seen = torch.randint(0, 16, (3, 8)), [], []

    def keep(weight, statistics):
        found.append(statistics.input_norm)
        return weight.abs()

    names = [weight.name for weight in prune(model, 0.8, tokens, criterion=keep).weights]
    first = next(name for name in names if name.startswith("encoder.blocks.1.0"))
    with model.get_submodule(first).register_forward_pre_hook(lambda layer, args: seen.append(args[0])):
        model(tokens)
    torch.testing.assert_close(found[names.index(first)], seen[0].detach().flatten(0, -2).norm(dim=0))


class ConvBlock(nn.Module):
    """Computes what two convolutions compute, with norms, beside a shortcut."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(nn.Module):
    """The layout of torchvision's and timm's ResNets: stages by name, each an `nn.Sequential` of blocks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))
        self.layer2 = nn.Sequential(ConvBlock(4, 8, 2), ConvBlock(8, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu())))
        return self.fc(self.avgpool(x).flatten(1))


class NamedStage(nn.Module):
    """Has its blocks by name, as the stages of timm's RegNet have."""

    def __init__(self, channels, width, depth):
        super().__init__()
        for i in range(depth):
            self.add_module(f"b{i + 1}", ConvBlock(width if i else channels, width, 1 if i else 2))

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class RegNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.s1, self.s2 = NamedStage(4, 4, 1), NamedStage(4, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.s2(self.s1(self.stem(x))).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1 = nn.Conv2d(4, 2, 1)
        self.branch2, self.branch3 = (
            nn.Sequential(ConvBlock(4, 1), ConvBlock(1, 1)) for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.inception3a, self.inception3b, self.maxpool1 = Inception(), Inception(), nn.MaxPool2d(2)
        self.inception4a = Inception()

    def forward(self, x):
        return self.inception4a(self.maxpool1(self.inception3b(self.inception3a(self.conv1(x)))))


class SqueezeNet(nn.Module):
    """A pooling stands between the blocks of one `nn.Sequential`."""

    def __init__(self):
        super().__init__()
        blocks = ConvBlock(4, 4), nn.MaxPool2d(2), ConvBlock(4, 8)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *blocks, nn.Dropout(), nn.Conv2d(8, 5, 1))

    def forward(self, x):
        return self.features(x).mean((2, 3))


VISION = {
    TorchResNet: [["layer1.0", "layer1.1"], ["layer2.0", "layer2.1"]],
    SqueezeNet: [["features.2", "features.3", "features.4"]],
    RegNet: [["s1.b1"], ["s2.b1", "s2.b2"]],
    GoogLeNet: [["inception3a", "inception3b", "maxpool1", "inception4a"]],
}


@pytest.mark.parametrize("kind", VISION)
def test_the_blocks_of_torch_style_vision_models_are_found_and_pruned_with_calibration(kind):
    model, images = kind().eval(), torch.randn(4, 3, 32, 32)
    assert [list(stack) for stack in find_stacks(model)] == VISION[kind]
    report = prune(model, 0.5, images, criterion="wanda")
    assert sparsity(model) == report.sparsity == pytest.approx(0.5, abs=0.03)
    assert not report.left_out


def test_stages_by_name_that_compute_more_than_their_blocks_are_blocks_themselves():
    model = RegNet()
    model.s2.add_module("shortcut", nn.Conv2d(4, 8, 1))
    assert [list(stack) for stack in find_stacks(model)] == [["s1", "s2"]]


def test_layers_with_numbers_in_their_names_are_no_blocks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc1, self.fc2 = (
                *(nn.Conv2d(3, 3, 3) for _ in "12"),
                *(nn.Linear(3, 3) for _ in "12"),
            )

    assert find_stacks(Net()) == []

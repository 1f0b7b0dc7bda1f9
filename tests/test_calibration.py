import pytest
import torch

from peft_sparse import prune
from peft_sparse.blocks import find_blocks, prunable_layers
from peft_sparse.calibration import BlockRunner, evaluation_mode, input_norms

from conftest import VOCABULARY


def norms_of(model, calibration, index=0):
    blocks = find_blocks(model)
    name = list(blocks)[index]
    layers = {key: layer for key, layer in prunable_layers(model).items() if key.startswith(f"{name}.")}
    runner = BlockRunner(model, blocks, calibration)
    for before in range(index):
        runner.advance(before)
    return {key: norm.value() for key, norm in input_norms(runner, index, layers).items()}


def reference_norms(model, batches):
    """Norms of the concatenated inputs, recorded by hooks while the whole model runs."""
    seen = {name: [] for name in prunable_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, layer in prunable_layers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs).norm(dim=0) for name, inputs in seen.items()}


def test_statistics_are_those_of_the_concatenated_inputs(model, tokens):
    expected = reference_norms(model, [{"input_ids": tokens}])
    for index in range(3):
        for name, norm in norms_of(model, tokens, index).items():
            torch.testing.assert_close(norm, expected[name], rtol=1e-4, atol=1e-6)


def test_batch_size_and_order_do_not_matter(llama, tokens):
    one_by_one = norms_of(llama, tokens, 1)
    in_batches = norms_of(llama, [{"input_ids": tokens[4:]}, {"input_ids": tokens[:4], "labels": tokens[:4]}], 1)
    for name, norm in one_by_one.items():
        torch.testing.assert_close(norm, in_batches[name])


def test_padding_is_not_counted(llama, tokens):
    padded = torch.cat([tokens, torch.zeros(6, 5, dtype=torch.long)], dim=1)
    attention_mask = torch.cat([torch.ones(6, 12), torch.zeros(6, 5)], dim=1).long()
    expected = norms_of(llama, tokens, 1)
    for name, norm in norms_of(llama, [{"input_ids": padded, "attention_mask": attention_mask}], 1).items():
        torch.testing.assert_close(norm, expected[name])


def test_blocks_are_left_as_they_were(model, tokens):
    model.train()
    expected = {name: (id(module), module.training) for name, module in model.named_modules()}
    with evaluation_mode(model):
        before = model(tokens).logits
        norms_of(model, tokens)
        assert torch.equal(model(tokens).logits, before)
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == expected
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_later_block_sees_its_pruned_predecessors(llama, tokens):
    prune(llama, 0.5, criterion="wanda", calibration=tokens)
    expected = reference_norms(llama, [{"input_ids": tokens}])
    name = "model.layers.2.self_attn.q_proj"
    torch.testing.assert_close(norms_of(llama, tokens, 2)[name], expected[name])


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_error_of_the_model_is_reported_as_itself(llama, tokens, block):
    class OwnError(Exception):
        pass

    def fail(*args, **kwargs):
        raise OwnError("the model's own words")

    llama.model.layers[block].mlp.forward = fail
    with pytest.raises(OwnError, match="the model's own words"):
        prune(llama, 0.5, criterion="wanda", calibration=tokens)
    assert not any("forward" in layer.__dict__ for layer in llama.model.layers)


def test_an_error_midway_tells_what_is_pruned(llama, tokens):
    calls = []

    def fail_later(module, args):
        calls.append(0)
        if len(calls) > len(tokens):
            raise RuntimeError("out of luck")

    llama.model.layers[1].register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        prune(llama, 0.5, criterion="wanda", calibration=tokens)
    assert "While pruning block 'model.layers.1'" in caught.value.__notes__[0]
    assert (llama.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    assert (llama.model.layers[1].mlp.up_proj.weight != 0).all()


def test_a_custom_stack_that_hands_on_tuples_is_run(llama, tokens):
    """Blocks that return more than hidden states, as T5's do, cannot be stood in for and still calibrate."""

    class HandsOn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, hidden, bias=None):
            bias = hidden.mean(-1, keepdim=True) if bias is None else bias
            return self.inner(hidden) + bias, bias

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(VOCABULARY, 8)
            self.block = torch.nn.ModuleList(HandsOn() for _ in range(3))

        def forward(self, input_ids):
            hidden, bias = self.embed(input_ids), None
            for block in self.block:
                hidden, bias = block(hidden, bias)
            return hidden

    stack = Stack()
    expected = reference_norms(stack, [{"input_ids": tokens}])
    for index in range(3):
        for name, norm in norms_of(stack, tokens, index).items():
            torch.testing.assert_close(norm, expected[name])

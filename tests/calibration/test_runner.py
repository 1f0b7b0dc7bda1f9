import contextlib
import gc
import mmap
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from peft_sparse import prune
from peft_sparse.calibration.inputs import as_inputs, evaluation_mode
from peft_sparse.calibration.memory import empty_apart
from peft_sparse.calibration.recording import tensors_of
from peft_sparse.calibration.residence import on_device
from peft_sparse.calibration.runner import BlockRunner, stack_runners
from peft_sparse.model.blocks import find_blocks, find_stacks

from checks import assert_same_weights, inputs_by_hooks
from conftest import ENCODER_DECODERS, FAMILIES, VOCABULARY, inputs_of, tiny


@torch.no_grad()
def states_by_hooks(model, batches):
    """What goes into every block, and what comes out of every stack, while the whole model runs."""
    states = {}

    def into(name):
        def hook(module, args, kwargs):
            states.setdefault(name, []).append((args or [kwargs.get("hidden_states")])[0])

        return hook

    def out_of(name):
        return lambda module, args, output: states.setdefault(name, []).append(
            output if isinstance(output, torch.Tensor) else output[0]
        )

    hooks = [b.register_forward_pre_hook(into(n), with_kwargs=True) for n, b in find_blocks(model).items()]
    for stack in find_stacks(model):
        name, block = list(stack.items())[-1]
        hooks.append(block.register_forward_hook(out_of(f"after {name}")))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return states


def states_by_the_engine(model, batches, **options):
    states = {}
    for runner in stack_runners(model, batches, **options):
        for index, name in enumerate(runner.names):
            into, out_of = [], []

            def before(module, args, kwargs, into=into):
                # What waits is overwritten by what the block returns for good.
                into.append((args or [kwargs.get("hidden_states")])[0].clone())

            def after(module, args, output, out_of=out_of):
                out_of.append(output if isinstance(output, torch.Tensor) else output[0])

            block = runner.blocks[index]
            hooks = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
            runner.run(index, lambda batch, constants: None)
            for hook in hooks:
                hook.remove()
            states[name] = into
            runner.advance(index)
        states[f"after {name}"] = out_of
    return states


def padded(family, batch):
    """The batch with its last tokens marked as padding, another number of them in every sequence and on every side."""
    masks = {}
    for number, (name, rows) in enumerate(batch.items()):
        kept = torch.tensor([rows.shape[1] - (row + number) % 4 for row in range(len(rows))])
        masks[name.replace("input_ids", "attention_mask")] = (torch.arange(rows.shape[1]) < kept[:, None]).long()
    return batch | masks


# -- the engine and the model's own pass -----------------------------------------------------------------------------


def test_what_comes_out_of_the_engine_is_what_the_model_computes(family):
    model, batch = tiny(family), inputs_of(family)
    batches = [{name: rows[:4] for name, rows in batch.items()}, {name: rows[4:] for name, rows in batch.items()}]
    if family != "vit":
        batches[1] = padded(family, batches[1])
    expected = states_by_hooks(model, batches)
    assert sum(name.startswith("after") for name in expected) == (2 if family in ENCODER_DECODERS else 1)
    for activations in ("device", "cpu", "disk"):
        found = states_by_the_engine(model, batches, activations=activations)
        assert found.keys() == expected.keys()
        for name, states in expected.items():
            for state, own in zip(found[name], states, strict=True):
                assert torch.equal(state, own), (name, activations)


def test_blocks_are_left_as_they_were(family):
    model, batch = tiny(family).train(), inputs_of(family)
    expected = {name: (id(module), module.training) for name, module in model.named_modules()}
    with evaluation_mode(model):
        before = model(**batch)[0]
        states_by_the_engine(model, [batch])
        assert torch.equal(model(**batch)[0], before)
    assert_same_weights(model, tiny(family))
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == expected
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_blocks_own_forward_comes_back(llama, tokens):
    block = llama.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    patched = block.__dict__["forward"]
    prune(llama, 0.5, criterion="wanda", calibration=tokens)
    assert block.__dict__["forward"] is patched


def test_a_stack_that_hands_on_more_than_hidden_states_is_run(tokens):
    """Blocks that return more than hidden states, as T5's do, cannot be stood in for and still calibrate."""
    stack, batches = HandsOnStack(), [{"input_ids": tokens}]
    expected = states_by_hooks(stack, batches)
    for name, states in states_by_the_engine(stack, batches).items():
        assert torch.equal(states[0], expected[name][0])


class HandsOn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, hidden, bias=None):
        bias = hidden.mean(-1, keepdim=True) if bias is None else bias
        return self.inner(hidden) + bias, bias


class HandsOnStack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.block = torch.nn.ModuleList(HandsOn() for _ in range(3))

    def forward(self, input_ids):
        hidden, bias = self.embed(input_ids), None
        for block in self.block:
            hidden, bias = block(hidden, bias)
        return hidden


def test_blocks_run_on_the_first_batch_alone_to_learn_how_they_are_called(llama, tokens):
    ran = []
    for name, block in find_blocks(llama).items():
        block.mlp.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    next(stack_runners(llama, [{"input_ids": row[None]} for row in tokens]))
    assert ran == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_blocks_after_the_last_wanted_one_run_in_the_proof_alone(llama, tokens):
    names = list(find_blocks(llama))
    ran = []
    for name, block in find_blocks(llama).items():
        block.mlp.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    counts = []
    for batches in (1, 4):
        ran.clear()
        prune(llama, 0.5, calibration=tokens[:batches], batch_size=1, target_modules=rf"{names[1]}\..*")
        counts.append([ran.count(name) for name in names])
    proof = counts[0][2]
    # Each block before is measured or advanced on every batch, the last wanted one only measured.
    assert counts == [[proof + 1, proof + 1, proof], [proof + 4, proof + 4, proof]]


def test_a_later_block_sees_its_pruned_predecessors(llama, tokens):
    seen = {}

    def spy(weight, statistics):
        seen[tuple(weight.flatten()[:3].tolist())] = statistics.input_norm
        return weight.abs()

    dense = tiny("llama")
    prune(llama, 0.5, criterion=spy, calibration=tokens)
    # The first two blocks as they are now, the third as it was: what the third was measured on.
    dense.model.layers[0], dense.model.layers[1] = llama.model.layers[0], llama.model.layers[1]
    name = "model.layers.2.mlp.down_proj"
    expected = inputs_by_hooks(dense, [{"input_ids": tokens}])[name].norm(dim=0)
    found = seen[tuple(dense.get_submodule(name).weight.flatten()[:3].tolist())]
    torch.testing.assert_close(found, expected)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches_share_what_they_have_in_common(family):
    model, batch = tiny(family), inputs_of(family)
    runner = next(stack_runners(model, [{"input_ids": row[None]} for row in batch["input_ids"]]))
    tensors = {id(leaf) for b in runner.batches for c in b.calls for leaf in tensors_of((c.args, c.kwargs))}
    one = {id(leaf) for call in runner.batches[0].calls for leaf in tensors_of((call.args, call.kwargs))}
    assert tensors == one


def test_arguments_of_batches_that_differ_are_kept_apart(llama, tokens):
    batches = [padded("llama", {"input_ids": rows}) for rows in tokens.split(3)]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(0)
    first, second = next(stack_runners(llama, batches)).batches
    one, other = first.calls[0].kwargs, second.calls[2].kwargs
    assert not torch.equal(one["attention_mask"], other["attention_mask"])
    assert all(a is b for a, b in zip(one["position_embeddings"], other["position_embeddings"], strict=True))


def test_files_of_hidden_states_are_removed(llama, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = next(stack_runners(llama, as_inputs(llama, tokens, 2), activations="disk"))
    assert all(isinstance(value, Path) for batch in runner.batches for value in batch.values.values())
    assert len(list(tmp_path.glob("*/*"))) == 3
    runner.advance(0)
    assert len(list(tmp_path.glob("*/*"))) == 3
    del runner
    gc.collect()
    assert not list(tmp_path.iterdir())
    prune(llama, 0.5, criterion="wanda", calibration=tokens, activations="disk")
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_hidden_states_wait_in_the_same_memory_at_every_block(llama, tokens):
    batches = [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:2, :7]}, {"input_ids": tokens[2:3]}]
    runner = next(stack_runners(llama, batches))

    def places():
        return [value.data_ptr() for batch in runner.batches for value in batch.values.values()]

    first = places()
    # Those of one shape lie side by side.
    assert first[2] - first[0] == 4 * tokens.shape[1] * llama.config.hidden_size
    for index in range(2):
        runner.advance(index)
        assert places() == first


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux says of a process")
def test_memory_apart_is_given_back_at_once():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before, size = resident(), 8 << 20
    tensor = empty_apart((2, size // 8), torch.ones(1), torch.device("cpu")).fill_(1)
    held = resident() - before
    del tensor
    assert held > size // 2
    assert resident() - before < size // 2


@pytest.mark.parametrize("labels", [False, True])
def test_logits_are_not_computed_where_nobody_reads_them(llama, tokens, labels):
    shapes = []
    llama.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    batch = {"input_ids": tokens} | ({"labels": tokens} if labels else {})
    prune(llama, 0.5, criterion="wanda", calibration=[batch])
    assert {shape[1] for shape in shapes} == {tokens.shape[1] if labels else 1}


# -- residence -------------------------------------------------------------------------------------------------------


def test_each_block_is_where_it_is_computed_for_its_turn_only(llama, tokens):
    inside, turns, ran = [], [], []

    @contextlib.contextmanager
    def residence(name, block):
        inside.append(name)
        turns.append(name)
        yield
        inside.remove(name)

    for name, block in find_blocks(llama).items():
        block.mlp.register_forward_pre_hook(lambda module, args, name=name: ran.append((name, *inside)))
    runner = BlockRunner(llama, find_blocks(llama), [{"input_ids": tokens}], residence=residence)
    for index in range(3):
        with runner.resident(index):
            runner.run(index, lambda batch, constants: None)
            runner.advance(index)
    names = [f"model.layers.{index}" for index in range(3)]
    assert turns == names + names
    assert list(dict.fromkeys(ran)) == [(name, name) for name in names]


def test_a_block_is_moved_to_the_device_and_back(llama, monkeypatch):
    block, moves = llama.model.layers[0], []
    monkeypatch.setattr(block, "to", moves.append)
    with contextlib.suppress(ZeroDivisionError), on_device("meta")("model.layers.0", block):
        assert moves == ["meta"]
        raise ZeroDivisionError
    assert moves == ["meta", torch.device("cpu")]
    for stays in (None, "cpu"):
        with on_device(stays)("model.layers.0", block):
            assert len(moves) == 2


# -- errors ----------------------------------------------------------------------------------------------------------


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


def test_every_family_of_the_issue_is_here():
    named = "llama mistral qwen2 qwen3 gemma2 gemma3 opt gpt2 gpt_neox phi mixtral qwen2_moe gpt_oss t5 bart vit"
    assert set(named.split()) == set(FAMILIES)

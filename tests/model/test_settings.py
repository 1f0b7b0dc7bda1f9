"""What the caller has set beforehand does not change what is pruned, and is as it was afterwards."""

import contextlib
import inspect

import pytest
import torch
from torch import nn

from peft_sparse import Fit, compact, prune, prune_checkpoint, prune_structured, reconstruct, reconstruct_checkpoint
from peft_sparse.model.settings import ordinary_settings

from checks import assert_same_weights
from conftest import tiny


TOKENS = torch.randint(0, 61, (6, 12), generator=torch.Generator().manual_seed(3))


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.backends.mha.get_fastpath_enabled(),
    )


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "a default dtype": lambda: default_dtype(torch.float64),
    "a narrow default dtype": lambda: default_dtype(torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
}
WORK = {
    "prune": lambda model: prune(model, 0.5, TOKENS, criterion="sparsegpt"),
    "gradients": lambda model: prune(model, 0.5, TOKENS, criterion="gblm"),
    "allocation": lambda model: prune(model, 0.5, TOKENS, criterion="wanda", allocation="owl", refinement="swap"),
    "reconstruct": lambda model: reconstruct(model, 0.5, TOKENS, criterion="wanda", fit=Fit(max_steps=3)),
    "prune_structured": lambda model: compact_after(prune_structured, model),
}


def compact_after(function, model):
    function(model, 0.3, TOKENS)
    compact(model)


@pytest.fixture(scope="module", params=WORK)
def work(request):
    model = tiny("llama")
    torch.manual_seed(0)
    WORK[request.param](model)
    return WORK[request.param], model


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on_settings_of_the_caller(work, setting):
    run, expected = work
    model = tiny("llama")
    with SETTINGS[setting]():
        if "autocast" in setting:
            # Autocast keeps a copy of each weight that it has cast.
            model(input_ids=TOKENS)
        before = state()
        torch.manual_seed(0)
        run(model)
        assert state() == before
    assert_same_weights(model, expected)


def test_autocast_afterwards_uses_the_pruned_weights(llama):
    with torch.autocast("cpu", torch.bfloat16):
        llama(input_ids=TOKENS)
        prune(llama, 0.5, TOKENS, criterion="wanda")
        within = llama(input_ids=TOKENS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(within, llama(input_ids=TOKENS).logits)


def test_settings_are_put_back_after_an_error():
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        before = state()
        with contextlib.suppress(ZeroDivisionError), ordinary_settings():
            assert state()[:3] == (False, False, False)
            raise ZeroDivisionError
        assert state() == before


COMPILED = {
    "blocks": lambda model: [block.compile(backend="eager") for block in model.model.layers],
    "parts of blocks": lambda model: [block.mlp.compile(backend="eager") for block in model.model.layers],
    "forwards of blocks": lambda model: [
        setattr(block, "forward", torch.compile(block.forward, backend="eager")) for block in model.model.layers
    ],
}


@pytest.mark.parametrize("part", COMPILED)
def test_compiled_modules_are_pruned_as_others(part, llama):
    expected = tiny("llama")
    prune(expected, 0.5, TOKENS, criterion="wanda")
    try:
        COMPILED[part](llama)
        with torch.no_grad():
            llama(input_ids=TOKENS)
        prune(llama, 0.5, TOKENS, criterion="wanda")
        assert_same_weights(llama, expected)
        with torch.no_grad():
            torch.testing.assert_close(llama(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
    finally:
        torch._dynamo.reset()


def test_hooks_and_stand_ins_in_a_compiled_block_that_has_run_are_seen():
    block = nn.Sequential(nn.Linear(4, 4))
    block.compile(backend="eager")
    try:
        for rows in (1, 2):
            block(torch.ones(rows, 4))
        seen = []
        block[0].register_forward_pre_hook(lambda *_: seen.append("inner"))
        block.register_forward_pre_hook(lambda *_: seen.append("block"))
        own = block.forward
        block.forward = lambda *inputs: (seen.append("forward"), own(*inputs))[1]
        with ordinary_settings():
            block(torch.ones(2, 4))
        assert seen == ["block", "forward", "inner"]
    finally:
        torch._dynamo.reset()


def test_attention_layers_of_torch_call_their_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    seen = []
    layer.self_attn.register_forward_hook(lambda *_: seen.append("attention"))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with ordinary_settings():
        layer(torch.ones(1, 3, 8))
    assert seen == ["attention"]


@pytest.mark.parametrize(
    "function", [prune, prune_checkpoint, reconstruct, reconstruct_checkpoint, prune_structured, compact]
)
def test_public_functions_keep_their_signature(function):
    assert {"model", "source"} & set(inspect.signature(function).parameters)

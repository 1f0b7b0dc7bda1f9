"""Assertions shared by the tests: each raises, none returns a bool. And references made without the package's help."""

import re

import torch

from peft_sparse.model.blocks import base_model, prunable_weights


def layers_of(model, *targets) -> dict[str, torch.nn.Module]:
    """The layers whose weights are pruned, by name, as their PEFT wrappers where they have one."""
    return {name: base_model(model).get_submodule(name) for name in prunable_weights(model, *targets)}


def zeros_of(model) -> dict[str, torch.Tensor]:
    """The zeros of every prunable weight, as (out, in) bools by name."""
    return {name: weight.matrix() == 0 for name, weight in prunable_weights(model).items()}


def assert_same_zeros(model, zeros: dict[str, torch.Tensor]) -> None:
    found = zeros_of(model)
    assert found.keys() == zeros.keys()
    for name, expected in zeros.items():
        assert torch.equal(found[name], expected), name


def assert_zeros_kept(model, zeros: dict[str, torch.Tensor]) -> None:
    found = zeros_of(model)
    assert found.keys() == zeros.keys()
    for name, expected in zeros.items():
        assert found[name][expected].all(), name


def assert_same_weights(model, other) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def train_some(model, tokens, steps: int = 3) -> None:
    """A few real optimiser steps on whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def inputs_by_hooks(model, batches) -> dict[str, torch.Tensor]:
    """The inputs (tokens, in) of every prunable weight, recorded by hooks while the whole model runs.

    Those of an expert are computed from the tokens that the router chose it for.
    """
    weights = prunable_weights(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in weights}
    experts = {id(w.layer): (name.rsplit(".", 2)[0], w.layer) for name, w in weights.items() if w.expert is not None}

    def on_layer(name):
        return lambda module, args: seen[name].append(args[0].flatten(0, -2))

    def on_experts(name):
        def hook(module, args):
            for expert in range(module.down_proj.shape[0]):
                rows = args[0][(args[1] == expert).any(1)]
                seen[f"{name}.gate_up_proj.{expert}"].append(rows)
                seen[f"{name}.down_proj.{expert}"].append(_between(module, expert, rows))

        return hook

    hooks = [w.layer.register_forward_pre_hook(on_layer(name)) for name, w in weights.items() if w.expert is None]
    hooks += [layer.register_forward_pre_hook(on_experts(name)) for name, layer in experts.values()]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def _between(experts, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What the second matrix of an expert is given: silu(gate) · up, or as GPT-OSS has it."""
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        return gate * gate.sigmoid() * up
    both = rows @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
    return (up + 1) * gate * (1.702 * gate).sigmoid()


def named(value) -> str:
    """Name a parameter the same in every process: without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))

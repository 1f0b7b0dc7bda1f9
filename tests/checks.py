"""Assertions shared by the tests: each raises, none returns a bool."""

import torch

from peft_sparse.blocks import base_layer, prunable_layers
from peft_sparse.weights import weight_matrix


def zeros_of(model) -> dict[str, torch.Tensor]:
    """The zeros of every prunable weight, as (out, in) bools by name."""
    return {name: weight_matrix(base_layer(layer)) == 0 for name, layer in prunable_layers(model).items()}


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


def train_some(model, tokens, steps: int = 3) -> None:
    """A few real optimiser steps on whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

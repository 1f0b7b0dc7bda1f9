"""The published loops of PERP and of Free Lunch, transcribed from their equations for Llama models.

They serve as rivals in benchmarks/recipes.py. Masks are stored tensors, gradients are those of autograd, and sequences
keep their order, as in the loops.

- PERP (Zimmer et al. 2023, arXiv:2312.15230): one-shot pruning, then retraining of adapters, norms and biases with the
  task loss. MaskLoRA is W + s · M ⊙ (BA) as one product with the sum. LoRA-Prune trains W + s · BA and prunes BA when
  it is merged.
- Free Lunch (arXiv:2510.14444): the blocks, or the attention and the MLP of each block, are pruned by Wanda and fitted
  to their dense outputs on the inputs that the sparse model gives them, by AdamW on all their weights.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import get_linear_schedule_with_warmup


class Adapted(nn.Module):
    """A linear layer with an adapter, as PERP writes it.

    Args:
        base: the pruned layer.
        rank: r.
        alpha: s = alpha / r.
        masked: whether BA is masked in training (MaskLoRA), or only when it is merged (LoRA-Prune).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, masked: bool) -> None:
        super().__init__()
        self.base, self.scaling, self.masked = base, alpha / rank, masked
        self.mask = (base.weight != 0).to(base.weight.dtype)
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer with its adapter."""
        if self.masked:
            return nn.functional.linear(x, self.base.weight + self.scaling * ((self.B @ self.A) * self.mask))
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the layer with the adapter merged into its weight."""
        self.base.weight += self.scaling * ((self.B @ self.A) * self.mask)
        return self.base


def perp(model: Any, tokens: Tensor, steps: int, rate: float, *, masked: bool, seed: int) -> None:
    """Retrain a pruned model by PERP: adapters of rank 16 and norms. One sequence a step. In place.

    Args:
        model: the pruned model.
        tokens: the sequences, (sequences, tokens). They are read from the first on, again and again.
        steps: number of optimiser steps.
        rate: the largest learning rate.
        masked: MaskLoRA or LoRA-Prune.
        seed: the seed of A.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    adapted = []
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Adapted(child, 16, 32.0, masked))
                    adapted.append((part, name))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    trained = [p for part, name in adapted for p in (getattr(part, name).A, getattr(part, name).B)]
    trained += [p.requires_grad_(True) for norm in norms for p in norm.parameters()]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    model.train()
    for step in range(steps):
        row = tokens[step % len(tokens)][None]
        model(input_ids=row, labels=row).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    for part, name in adapted:
        setattr(part, name, getattr(part, name).merged())


def free_lunch(model: Any, tokens: Tensor, pattern: Any, rate: float, *, submodules: bool, batch: int = 2) -> None:
    """Prune by Wanda and reconstruct by Free Lunch, with sparse inputs and dense targets for them. In place.

    Args:
        model: the dense model.
        tokens: the calibration sequences, (sequences, tokens).
        pattern: a sparsity, or (n, m).
        rate: the largest learning rate.
        submodules: whether attention and MLP are fitted apart, or the block.
        batch: sequences in a step.
    """
    batches = tokens.split(batch)
    with torch.no_grad():
        hidden = [model.model.embed_tokens(rows) for rows in batches]
        rotary = model.model.rotary_emb(hidden[0], torch.arange(tokens.shape[1], device=tokens.device)[None])
    for layer in model.model.layers:
        for parts, run in _regions(layer, rotary, submodules):
            hidden = _fit(parts, run, hidden, pattern, rate)


def _regions(
    layer: Any, rotary: Any, submodules: bool
) -> Iterator[tuple[list[nn.Module], Callable[[Tensor], Tensor]]]:
    def attention(x: Tensor) -> Tensor:
        out: Tensor = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
        return x + out

    def mlp(x: Tensor) -> Tensor:
        out: Tensor = layer.mlp(layer.post_attention_layernorm(x))
        return x + out

    if submodules:
        yield [layer.input_layernorm, layer.self_attn], attention
        yield [layer.post_attention_layernorm, layer.mlp], mlp
    else:
        yield [layer], lambda x: mlp(attention(x))


def _fit(
    parts: list[nn.Module], run: Callable[[Tensor], Tensor], hidden: list[Tensor], pattern: Any, rate: float
) -> list[Tensor]:
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    squares = [torch.zeros(m.in_features, device=m.weight.device) for m in linears]

    def adding(total: Tensor) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            # A hook that returns something replaces the output.
            total.add_(inputs[0].flatten(0, -2).square().sum(0))

        return hook

    hooks = [m.register_forward_hook(adding(total)) for m, total in zip(linears, squares, strict=True)]
    with torch.no_grad():
        targets = [run(x) for x in hidden]
    for hook in hooks:
        hook.remove()
    for linear, total in zip(linears, squares, strict=True):
        torch_prune.custom_from_mask(linear, "weight", _mask(linear.weight.detach().abs() * total.sqrt(), pattern))
    parameters = [p.requires_grad_(True) for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * len(hidden)), len(hidden))
    for x, target in zip(hidden, targets, strict=True):
        nn.functional.mse_loss(run(x), target).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for linear in linears:
        torch_prune.remove(linear, "weight")
    with torch.no_grad():
        return [run(x) for x in hidden]


def _mask(score: Tensor, pattern: Any) -> Tensor:
    """Return the mask of Wanda: the lowest scores of each row, or of each m entries, are pruned."""
    mask = torch.ones_like(score)
    if isinstance(pattern, tuple):
        n, m = pattern
        lowest = score.view(len(score), -1, m).argsort(dim=-1, stable=True)[..., : m - n]
        mask.view(len(score), -1, m).scatter_(-1, lowest, 0)
        return mask
    return mask.scatter_(1, score.argsort(dim=1, stable=True)[:, : int(pattern * score.shape[1])], 0)

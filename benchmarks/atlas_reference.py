"""An independent implementation of sequential Wanda: full passes of the whole model, with hooks on the targets.

It shares no code with the engine. It takes from the package only the list of blocks and of targets. For each block, in
the order in which blocks first run, the whole model runs on all batches. Hooks add up the squares of what each target
is multiplied with. The scores |W| · norm select the zeros.

Padding is left out without any rule about masks: each sequence of a padded batch runs alone, cut to its real tokens.
Where a model gives other numbers then (its own convolutions see the padding), rows are left out by their place
(sequences, tokens), and a target whose rows have no such place is not compared. All rows count of inputs that stay the
same when all these tokens are replaced by others, such as the states of images or the distances between tokens. If
sequences alone have other numbers of such inputs, these count as well: nothing says which are right.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_inputs import Batch, run
from atlas_padding import Given, Pass, passes_of
from peft_sparse.model.blocks import find_blocks, prunable_weights


# Scores that differ by less than this fraction may change places: the engine adds up in another order.
ROUNDING = 1e-4


@dataclass
class Comparison:
    """How the zeros of the engine differ from those of the reference."""

    entries: int = 0
    different: int = 0
    rounding: int = 0
    not_compared: dict[str, str] = field(default_factory=dict)
    first: str = ""

    def add(self, other: "Comparison") -> None:
        """Add what was found for one weight."""
        self.entries += other.entries
        self.different += other.different
        self.rounding += other.rounding
        self.first = self.first or other.first

    @property
    def verdict(self) -> str:
        if self.different:
            return f"wrong: {self.different} of {self.entries} entries differ, first in {self.first}"
        return "works" if self.entries else "not compared"


class Watch(TorchDispatchMode):
    """Adds up the squared inputs of weights while the model runs: (out, in), as rows of a weight may see other inputs.

    Layers that are called as modules are watched by hooks. The others are found in the products of the pass, by the
    memory of their weights.
    """

    def __init__(self, weights: dict[str, Any], called: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.squares = {name: torch.zeros(tuple(w.shape), dtype=torch.float64) for name, w in weights.items()}
        self.rows = dict.fromkeys(weights, 0)
        self.unplaced: dict[str, str] = {}
        self.masks: list[Tensor] = []
        # Names of weights whose inputs do not depend on padding.
        self.unpadded: set[str] = set()
        # Names of weights that are not watched at present.
        self.muted: set[str] = set()
        self.hooked = {name: w for name, w in weights.items() if w.expert is None and id(w.layer) in called}
        self.others = {name: w for name, w in weights.items() if name not in self.hooked}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for name, weight in self.hooked.items():
                hook = weight.layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                undo.callback(hook.remove)
            if self.others:
                undo.enter_context(self)
            yield

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad():
                if isinstance(module, nn.Conv2d):
                    self._convolution(name, module, inputs)
                else:
                    self.add(name, inputs)

        return hook

    def _convolution(self, name: str, module: nn.Conv2d, inputs: Tensor) -> None:
        if isinstance(module.padding, str):
            total = [d * (k - 1) if module.padding == "same" else 0
                     for d, k in zip(module.dilation, module.kernel_size, strict=True)]  # fmt: skip
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(int(p), int(p)) for p in module.padding]
        pads = [*sides[1], *sides[0]]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(inputs if inputs.dim() == 4 else inputs[None], pads, mode=mode)
        if name in self.muted:
            return
        if self.masks and name not in self.unpadded:
            self.unplaced[name] = "a convolution over tokens, in a padded batch"
            return
        patches = nn.functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride).double()
        sums = patches.square().sum((0, 2)).view(module.groups, -1)
        self.squares[name] += sums.repeat_interleave(module.out_channels // module.groups, dim=0)
        self.rows[name] += patches.shape[0] * patches.shape[2]

    def add(self, name: str, inputs: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        """Add inputs (..., in) of the part [rows, columns] of a weight."""
        if name in self.muted:
            return
        kept = inputs.reshape(-1, inputs.shape[-1])
        if self.masks:
            shape = tuple(inputs.shape[:-1])
            place = next((p for p in (_flat(mask, shape) for mask in self.masks) if p is not None), None)
            if name in self.unpadded:
                place = torch.ones(len(kept), dtype=torch.bool)
            if place is None:
                self.unplaced[name] = f"inputs of shape {tuple(inputs.shape)} in a padded batch"
                return
            kept = kept[place]
        self.squares[name][rows, columns] += kept.double().square().sum(0)
        self.rows[name] += len(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            operands = args[0], args[1]
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default, torch.ops.aten.addbmm.default):
            operands = args[1], args[2]
        elif func is torch.ops.aten.mv.default:
            operands = args[0], args[1][:, None]
        if operands is not None:
            left, right = operands
            self._product(right.mT, left)
            self._product(left, right.mT)
        return func(*args, **kwargs)

    def _product(self, weight: Tensor, inputs: Tensor) -> None:
        """Look for targets in `weight` (..., out, in), which is multiplied with `inputs` (..., tokens, in)."""
        for name, view in self.others.items():
            if view.storage.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                continue
            for index in range(weight.shape[0] if weight.dim() == 3 else 1):
                part = weight[index] if weight.dim() == 3 else weight
                found = _place(view.matrix(), part)
                if found is None:
                    continue
                given = inputs[index] if inputs.dim() == 3 else inputs
                if self.masks and name not in self.unpadded:
                    # A product has lost the order of sequences and tokens.
                    self.unplaced[name] = "its layer is not called, in a padded batch"
                    continue
                self.add(name, given, *found)


def _flat(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return a mask (sequences, tokens) for rows of `shape`, which may have tokens first; None if it does not fit."""
    if shape in (tuple(mask.shape), (mask.numel(),)):
        return mask.flatten().bool()
    return mask.T.flatten().bool() if shape == tuple(mask.T.shape) else None


def _place(matrix: Tensor, part: Tensor) -> tuple[slice, slice] | None:
    """Return where the view `part` (out', in') lies in the view `matrix` (out, in) of one memory, or None."""
    if matrix.stride() != part.stride() and min(part.shape) > 1:
        return None
    distance = part.storage_offset() - matrix.storage_offset()
    rows, columns = matrix.stride()
    if distance < 0:
        return None
    if rows >= columns:
        row, column = distance // rows, distance % rows // columns
    else:
        column, row = distance // columns, distance % columns // rows
    if row + part.shape[0] > matrix.shape[0] or column + part.shape[1] > matrix.shape[1]:
        return None
    return slice(row, row + part.shape[0]), slice(column, column + part.shape[1])


class Reference:
    """The reference for one model and its batches.

    Args:
        model: the dense model. `compare` writes the engine's weights into it, block by block.
        batches: the model inputs.
    """

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.model = model.eval()
        if hasattr(model, "set_experts_implementation"):
            with contextlib.suppress(Exception):
                model.set_experts_implementation("eager")
        self.blocks = find_blocks(model)
        self.given, self.how = passes_of(model, batches)
        self.order, self.called = self._order()
        for given in self.given:
            if given.changed is not None:
                given.unpadded = self._unpadded(given, prunable_weights(model))

    def never_run(self) -> list[str]:
        """Return the blocks that do not run on these batches."""
        return [name for name in self.blocks if name not in self.order]

    @torch.no_grad()
    def _order(self) -> tuple[list[str], set[int]]:
        """Return the blocks in the order in which they first run, and the ids of all modules that are called."""
        order: dict[str, None] = {}
        called: set[int] = set()
        with contextlib.ExitStack() as undo:
            owners = {id(block): name for name, block in self.blocks.items()}
            inside = {id(m): name for name, block in self.blocks.items() for m in block.modules()}

            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                called.add(id(module))
                # A block may be used through its parts, without being called itself.
                name = owners.get(id(module)) or inside.get(id(module))
                if name is not None:
                    order.setdefault(name)

            for module in self.model.modules():
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for given in self.given:
                for each in given.passes:
                    run(self.model, each.batch)
        return list(order), called

    def _unpadded(self, given: Given, weights: dict[str, Any]) -> set[str]:
        """Return the targets whose inputs stay the same when all tokens of a padded batch are replaced by others."""
        whole = self._watched(weights, [Given(given.batch, [Pass(given.batch)])])
        changed = self._watched(weights, [Given(given.batch, [Pass(given.changed or {})])])
        return {
            name
            for name in weights
            if whole.rows[name] == changed.rows[name] and torch.equal(whole.squares[name], changed.squares[name])
        }

    @torch.no_grad()
    def compare(self, pruned: nn.Module, targets: list[str], pattern: float | str) -> Comparison:
        """Compare the zeros in `pruned`, which the engine pruned, with those that this reference selects.

        Each block is compared given the engine's zeros in the blocks before it, so that the first difference does not
        hide in those that follow.
        """
        result = Comparison()
        mine = {name: w for name, w in prunable_weights(self.model).items() if name in targets}
        theirs = prunable_weights(pruned)
        for block in self.order:
            weights = {name: w for name, w in mine.items() if name.startswith(f"{block}.")}
            if weights:
                self._look_again(weights)
                watch = self._watched(weights)
                for name, weight in weights.items():
                    if name in watch.unplaced:
                        result.not_compared[name] = watch.unplaced[name]
                        continue
                    found = _compare(name, weight.matrix(), watch, theirs[name].matrix(), pattern)
                    if found.different and any(name in g.unpadded for g in self.given if len(g.passes) > 1):
                        alone = self._watched({name: weight}, [Given(g.batch, g.passes) for g in self.given])
                        found = _compare(name, weight.matrix(), alone, theirs[name].matrix(), pattern)
                    result.add(found)
                for name, weight in weights.items():
                    weight.write(theirs[name].matrix())
        return result

    def _look_again(self, weights: dict[str, Any]) -> None:
        """Find out anew what depends on padding: tokens choose other experts once the blocks before are pruned."""
        for given in self.given:
            mine = {name: weight for name, weight in weights.items() if name in given.unpadded}
            if mine:
                given.unpadded -= mine.keys() - self._unpadded(given, mine)

    @torch.no_grad()
    def _watched(self, weights: dict[str, Any], batches: list[Given] | None = None) -> Watch:
        """Run the model on batches, and return what the targets `weights` were multiplied with."""
        watch = Watch(weights, self.called)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with watch.watching():
                for given in self.given if batches is None else batches:
                    watch.unpadded = given.unpadded
                    alone = len(given.passes) > 1
                    watch.muted = given.unpadded if alone else set()
                    for each in given.passes:
                        watch.masks = each.masks
                        run(self.model, each.batch)
                    if alone and not given.unpadded.isdisjoint(weights):
                        watch.masks, watch.muted = [], set(weights) - given.unpadded
                        run(self.model, given.batch)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return watch


def _compare(name: str, dense: Tensor, watch: Watch, pruned: Tensor, pattern: float | str) -> Comparison:
    """Compare the zeros of one weight."""
    result, squares, rows = Comparison(), watch.squares[name], watch.rows[name]
    scores = dense.abs().double() * (squares.sqrt() if rows else 1)
    theirs = pruned == 0
    kept = pruned[~theirs]
    if not torch.equal(kept, dense[~theirs]):
        result.different += int((kept != dense[~theirs]).sum())
        result.first = result.first or f"{name} (kept weights changed)"
    size, drop = (scores.shape[1], scores.shape[1] // 2) if pattern == 0.5 else (4, 2)
    groups, given = scores.reshape(-1, size), theirs.reshape(-1, size)
    order = groups.argsort(dim=1, stable=True)
    counts = torch.full((len(groups),), drop)
    if pattern == 0.5 and size % 2:
        # Half of all entries is exact: the rows whose next entry is lowest lose one more.
        following = groups.gather(1, order[:, drop : drop + 1]).squeeze(1)
        counts[following.argsort(stable=True)[: groups.numel() // 2 - drop * len(groups)]] += 1
    places = torch.arange(size).expand(len(groups), -1)
    mine = torch.zeros_like(given).scatter_(1, order, places < counts[:, None])
    result.entries += mine.numel()
    unequal = (mine != given).any(1)
    if not unequal.any():
        return result
    groups, mine, given, counts = groups[unequal], mine[unequal], given[unequal], counts[unequal]
    highest_pruned = groups.masked_fill(~given, -1).amax(1)
    lowest_kept = groups.masked_fill(given, torch.inf).amin(1)
    fine = (given.sum(1) == counts) & (highest_pruned <= lowest_kept * (1 + ROUNDING) + 1e-30)
    result.rounding += int((mine != given)[fine].sum())
    different = int((mine != given)[~fine].sum())
    if different:
        result.different += different
        result.first = result.first or f"{name} ({different} of {theirs.numel()}; {rows} rows)"
    return result

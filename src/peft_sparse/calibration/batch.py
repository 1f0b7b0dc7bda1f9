"""One calibration batch on its way through a stack of blocks, and how a block behaves when it is called."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .padding import Padding
from .recording import Call, Link


# The calls of one batch: (name of the block, links to what earlier calls returned).
Order = list[tuple[str, list[Link]]]


@dataclass
class Batch:
    """One calibration batch on its way through a stack.

    Args:
        number: number of the batch.
        padding: which tokens count.
        calls: the calls of the blocks, in the order in which the model makes them.
        values: the tensors that unfinished calls take, by link. With activations on disk, the paths of their files.
        finished: numbers of the calls that have been made for good.
    """

    number: int
    padding: Padding = field(default_factory=Padding)
    calls: list[Call] = field(default_factory=list)
    values: dict[Link, Tensor | Path] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    # Link -> the calls that take it; number of a call -> the calls that take what it returns; block -> its calls.
    _takers: dict[Link, set[int]] = field(default_factory=dict)
    _followers: dict[int, set[int]] = field(default_factory=dict)
    _of_block: dict[int, list[int]] = field(default_factory=dict)

    def complete(self) -> None:
        """Note which call takes what. Call it once, when all calls are known."""
        for number, call in enumerate(self.calls):
            self._of_block.setdefault(call.block, []).append(number)
            for link in call.links:
                self._takers.setdefault(link, set()).add(number)
                self._followers.setdefault(link.call, set()).add(number)

    def calls_of(self, block: int) -> list[int]:
        """Return the numbers of the calls of a block."""
        return self._of_block.get(block, [])

    def taken(self, call: int, tensors: list[Tensor]) -> dict[Link, Tensor]:
        """Return those of the tensors that call number `call` returned which later calls take."""
        links = {Link(call, leaf): tensor for leaf, tensor in enumerate(tensors)}
        return {link: tensor for link, tensor in links.items() if link in self._takers}

    def is_taken(self, call: int) -> bool:
        """Return whether a later call takes anything that call number `call` returns."""
        return call in self._followers

    def finish(self, call: int) -> list[int]:
        """Note that a call was made for good. Return the calls that may be ready now."""
        self.finished.add(call)
        for link in self.calls[call].links:
            self._takers[link].discard(call)
            if not self._takers[link]:
                self._drop(link)
        # The constants of this call are not needed any more.
        self.calls[call].args, self.calls[call].kwargs = (), {}
        return sorted(self._followers.get(call, ()))

    def _drop(self, link: Link) -> None:
        waiting = self.values.pop(link, None)
        if isinstance(waiting, Path):
            waiting.unlink()

    def is_ready(self, call: int) -> bool:
        """Return whether a call is unfinished, and all that it takes comes from finished calls."""
        unfinished = call not in self.finished
        return unfinished and all(link.call < 0 or link.call in self.finished for link in self.calls[call].links)


@dataclass(frozen=True)
class Trait:
    """How a block behaves when it is called.

    Args:
        tree: what it returned, without values of tensors.
        mirrored: number of the leaf among its arguments that has the shape and dtype of the one tensor it returns.
            None if it returns several tensors, or one of another shape: then it cannot be stood in for.
        writes: whether it writes into tensors among its arguments.
        states: numbers of the returned tensors that depend on what earlier calls returned.
    """

    tree: Any
    mirrored: int | None
    writes: bool
    states: tuple[int, ...] = (0,)


class EnoughSeen(Exception):
    """Raised within a block to end the run of this batch, because nothing that follows is needed."""

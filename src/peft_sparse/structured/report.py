"""What `prune_structured` did, with true parameter counts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class UnitsReport:
    """The units of one attention or MLP.

    Args:
        name: of the attention or MLP.
        kind: "attention" or "mlp".
        units: KV groups or neurons there were.
        kept: how many remain.
        heads_per_unit: query heads of one KV group; 1 for neurons.
        cost: parameters of one unit, biases included.
    """

    name: str
    kind: str
    units: int
    kept: int
    heads_per_unit: int
    cost: int


@dataclass(frozen=True)
class StructuredReport:
    """What `prune_structured` did.

    Args:
        metric, structure, ratio: as asked for.
        compensated: whether biases were.
        parameters_added: parameters of the biases that compensation created, with zeros beside them where a family has
            biases in all layers of an attention or MLP or in none.
        seconds: wall-clock time.
        peak_memory: bytes, as `peft_sparse.model.environment.peak_memory` tells.
        layers: one entry per attention and MLP.
    """

    metric: str
    structure: str
    ratio: float
    compensated: bool
    parameters_added: int
    seconds: float
    peak_memory: int
    layers: tuple[UnitsReport, ...]

    @property
    def parameters_prunable(self) -> int:
        """Parameters of all units before."""
        return sum(layer.units * layer.cost for layer in self.layers)

    @property
    def parameters_removed(self) -> int:
        """Parameters of all units that went, zeros until `compact` cuts them out."""
        return sum((layer.units - layer.kept) * layer.cost for layer in self.layers)

    @property
    def removed(self) -> float:
        """Fraction of `parameters_prunable` that went; at least `ratio`, by as little more as units allow."""
        return self.parameters_removed / self.parameters_prunable

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        counts = ("parameters_prunable", "parameters_removed", "removed")
        return {**asdict(self), **{name: getattr(self, name) for name in counts}}

    def __str__(self) -> str:
        gone = {kind: self._count(kind) for kind in ("attention", "mlp")}
        (heads, all_heads), (neurons, all_neurons) = gone["attention"], gone["mlp"]
        return (
            f"removed {heads} of {all_heads} heads and {neurons} of {all_neurons} neurons, {self.removed:.4f} of "
            f"their {self.parameters_prunable} parameters where {self.ratio:g} was asked for ({self.metric}, "
            f"{self.structure}), and added {self.parameters_added} for biases, in {self.seconds:.1f} s"
        )

    def _count(self, kind: str) -> tuple[int, int]:
        of_kind = [layer for layer in self.layers if layer.kind == kind]
        gone = sum((layer.units - layer.kept) * layer.heads_per_unit for layer in of_kind)
        return gone, sum(layer.units * layer.heads_per_unit for layer in of_kind)

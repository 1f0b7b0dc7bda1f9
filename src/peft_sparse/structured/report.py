"""The report of `prune_structured`, with numbers of units and parameters."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class UnitsReport:
    """What `prune_structured` removed from one attention, one MLP or one mixture of experts.

    Args:
        name: name of the attention, MLP or mixture, such as "model.layers.0.self_attn".
        kind: "attention", "mlp" or "experts".
        units: number of KV groups, neurons or experts before pruning.
        kept: number of KV groups, neurons or experts after pruning.
        heads_per_unit: number of query heads of one KV group; 1 for an MLP and for experts.
        cost: number of parameters of one unit, biases included. For an expert that is cut out with its row of the
            router, this row is included.
        removed_units: for experts, the numbers that the removed ones had before pruning. For heads and neurons it is
            empty: they are the zeros of the model.
        unreached_units: for experts, the numbers of those that no calibration token was sent to.
    """

    name: str
    kind: str
    units: int
    kept: int
    heads_per_unit: int
    cost: int
    removed_units: tuple[int, ...] = ()
    unreached_units: tuple[int, ...] = ()


@dataclass(frozen=True)
class StructuredReport:
    """What `prune_structured` did.

    Args:
        metric: the metric that was used, such as "wifv".
        structure: the structure that was used, such as "al-am".
        ratio: the fraction of parameters that the caller asked to remove.
        compensated: whether the mean contributions of removed channels were added to biases, or removed experts were
            replaced by their mean outputs.
        parameters_added: number of parameters of new biases, or of the mean outputs of experts. Some families have
            biases in all layers of an attention or MLP or in none; there this includes zero biases in the layers that
            needed no compensation.
        seconds: wall-clock time.
        peak_memory: largest memory of this process so far, in bytes: GPU memory if there is a GPU, else resident
            memory.
        layers: one entry per pruned attention, MLP and mixture of experts.
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
        """Number of parameters of all units before pruning."""
        return sum(layer.units * layer.cost for layer in self.layers)

    @property
    def parameters_removed(self) -> int:
        """Number of parameters of all removed units.

        Heads and neurons are zeros until `compact` cuts them out. Experts are cut out already.
        """
        return sum((layer.units - layer.kept) * layer.cost for layer in self.layers)

    @property
    def removed(self) -> float:
        """Fraction of `parameters_prunable` that was removed, at least `ratio`."""
        return self.parameters_removed / self.parameters_prunable

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` accepts."""
        counts = ("parameters_prunable", "parameters_removed", "removed")
        return {**asdict(self), **{name: getattr(self, name) for name in counts}}

    def __str__(self) -> str:
        if self.layers and self.layers[0].kind == "experts":
            return self._of_experts()
        gone = {kind: self._count(kind) for kind in ("attention", "mlp")}
        (heads, all_heads), (neurons, all_neurons) = gone["attention"], gone["mlp"]
        return (
            f"removed {heads} of {all_heads} heads and {neurons} of {all_neurons} neurons, which hold "
            f"{self.removed:.4f} of their {self.parameters_prunable} parameters (ratio {self.ratio:g}, {self.metric}, "
            f"{self.structure}); added {self.parameters_added} parameters in biases; {self.seconds:.1f} s"
        )

    def _of_experts(self) -> str:
        gone, total = self._count("experts")
        unreached = sum(len(layer.unreached_units) for layer in self.layers)
        means = f" and replaced by their mean outputs, {self.parameters_added} parameters"
        replaced = means if self.compensated else ""
        return (
            f"removed {gone} of {total} experts, which hold {self.removed:.4f} of their {self.parameters_prunable} "
            f"parameters (ratio {self.ratio:g}, {self.metric}){replaced}; no token reached {unreached} of them; "
            f"{self.seconds:.1f} s"
        )

    def _count(self, kind: str) -> tuple[int, int]:
        of_kind = [layer for layer in self.layers if layer.kind == kind]
        gone = sum((layer.units - layer.kept) * layer.heads_per_unit for layer in of_kind)
        return gone, sum(layer.units * layer.heads_per_unit for layer in of_kind)

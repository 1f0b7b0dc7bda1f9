"""The report of `prune_structured`, with numbers of units and parameters."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class UnitsReport:
    """What `prune_structured` removed from one attention, MLP, mixture of experts, or set of convolutions.

    Args:
        name: name of the attention, MLP or mixture, such as "model.layers.0.self_attn". For filters it is the first of
            the convolutions whose filters are removed together.
        kind: "attention", "mlp", "experts" or "filters".
        units: number of KV groups, neurons, experts or channels before pruning.
        kept: number of KV groups, neurons, experts or channels after pruning.
        heads_per_unit: number of query heads of one KV group; number of filters that make one channel, more than 1
            where convolutions are added; 1 for an MLP and for experts.
        cost: number of parameters of one unit, biases included. For an expert that is cut out with its row of the
            router, this row is included. For a channel it counts its filters and its entries in normalisations, but
            not the input channels that read it: these are counted with the filters that they are a part of.
        removed_units: for experts and channels, the numbers that the removed ones had before pruning. For heads and
            neurons it is empty: they are the zeros of the model.
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
        ratio: the fraction that the caller asked to remove. For heads and neurons it is a fraction of the parameters,
            for experts and filters a fraction of their number.
        compensated: for heads and neurons, whether the mean contributions of removed channels were added to biases.
            For experts, whether their mean outputs took their place.
        parameters_added: number of parameters of new biases, or of the mean outputs of experts. Some families need
            biases in all layers of an attention or MLP if one layer has a bias. The zero biases of the other layers
            are counted too.
        seconds: wall-clock time.
        peak_memory: largest memory of this process so far, in bytes: GPU memory if there is a GPU, else resident
            memory.
        layers: one entry per pruned attention, MLP, mixture of experts, and set of convolutions.
        left_out: for filters, the convolutions with filters that stay, by name, each with the reason in words, such as
            "excluded" or "the model returns them".
    """

    metric: str
    structure: str
    ratio: float
    compensated: bool
    parameters_added: int
    seconds: float
    peak_memory: int
    layers: tuple[UnitsReport, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def parameters_prunable(self) -> int:
        """Number of parameters of all units before pruning."""
        return sum(layer.units * layer.cost for layer in self.layers)

    @property
    def parameters_removed(self) -> int:
        """Number of parameters of all removed units.

        Heads, neurons and filters are zeros until `compact` cuts them out. Experts are cut out already.
        """
        return sum((layer.units - layer.kept) * layer.cost for layer in self.layers)

    @property
    def removed(self) -> float:
        """Fraction of `parameters_prunable` that was removed.

        It is at least `ratio`, except for filters: there `ratio` is a fraction of their number.
        """
        return self.parameters_removed / self.parameters_prunable

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` accepts."""
        counts = ("parameters_prunable", "parameters_removed", "removed")
        return {**asdict(self), **{name: getattr(self, name) for name in counts}}

    def __str__(self) -> str:
        if self.layers and self.layers[0].kind == "experts":
            return self._of_experts()
        if self.layers and self.layers[0].kind == "filters":
            return self._of_filters()
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

    def _of_filters(self) -> str:
        gone, total = self._count("filters")
        left = f"; filters of {len(self.left_out)} convolutions stay, see `left_out`" if self.left_out else ""
        return (
            f"removed {gone} of {total} filters, {gone / total:.4f} of them (ratio {self.ratio:g}, {self.metric}, "
            f"{self.structure}){left}; {self.seconds:.1f} s"
        )

    def _count(self, kind: str) -> tuple[int, int]:
        of_kind = [layer for layer in self.layers if layer.kind == kind]
        gone = sum((layer.units - layer.kept) * layer.heads_per_unit for layer in of_kind)
        return gone, sum(layer.units * layer.heads_per_unit for layer in of_kind)

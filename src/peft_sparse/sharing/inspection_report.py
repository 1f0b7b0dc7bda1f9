"""What an inspection found, as values, as a text and as JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixInspection:
    """A matrix of a checkpoint, or stacked matrices.

    Args:
        name: name of the tensor; of an adapter, of the layer that it adapts.
        shape: its shape in the file.
        dtype: its dtype, as safetensors writes it; of an adapter, "-".
        zeros: number of its zeros.
        sparsity: fraction of its entries that are zero.
        pattern: "n:m" along the inputs, or with words where it is along another axis, or None.
        fingerprint: shape, number of zeros, and hash of the mask, as adapters of this package store it.
        inside: whether its name has a number, as names inside of blocks have. Embeddings and heads have none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str | None
    fingerprint: str
    inside: bool


@dataclass(frozen=True)
class AdapterInspection:
    """What an adapter is for. Fields are None where its configuration has no such entry.

    Args:
        peft_type: its method.
        base_model: the id or the folder of its base model.
        revision: the revision of the base model.
        task_type: its task.
        r: the rank.
        alpha: `lora_alpha`.
        target_modules: the layers that it adapts.
        saved_masks: the number of masks that travel with it: it loads onto the dense base model.
        fingerprints: the number of fingerprints that travel with it: its base model is compared with them.
        other_pruned: the number of pruned weights that it does not adapt: it needs the pruned base model.
    """

    peft_type: str | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    r: int | None
    alpha: float | None
    target_modules: list[str] | str | None
    saved_masks: int
    fingerprints: int
    other_pruned: int = 0

    def __str__(self) -> str:
        targets = self.target_modules if isinstance(self.target_modules, str) else ", ".join(self.target_modules or [])
        masks = "no masks and no fingerprints of masks"
        if self.saved_masks:
            which = "the pruned base model" if self.other_pruned else "the dense or the pruned base model"
            masks = f"{self.saved_masks} masks: loads onto {which}"
        elif self.fingerprints:
            masks = f"{self.fingerprints} fingerprints of masks: loads onto the base model with the same zeros"
        base = self.base_model or "not named"
        revision = f" at {self.revision}" if self.revision else ""
        return (
            f"method {self.peft_type}, r {self.r}, alpha {self.alpha}, task {self.task_type}\n"
            f"base model {base}{revision}\ntarget modules {targets}\n{masks}"
        )


@dataclass(frozen=True)
class CheckpointInspection:
    """What a checkpoint holds.

    Args:
        source: the folder, the file or the id.
        kind: "model", "packed model" or "adapter".
        bytes: size of the files with tensors.
        tensors: number of tensors.
        entries: number of entries by dtype.
        matrices: every matrix. Of an adapter, those of the base model that it has fingerprints for.
        notes: what could not be read, and why.
        adapter: what an adapter is for. None for a model.
    """

    source: str
    kind: str
    bytes: int
    tensors: int
    entries: dict[str, int]
    matrices: tuple[MatrixInspection, ...]
    notes: tuple[str, ...]
    adapter: AdapterInspection | None

    @property
    def counted(self) -> tuple[MatrixInspection, ...]:
        """The matrices that `sparsity` counts: those inside of blocks, or all if no name has a number."""
        return tuple(matrix for matrix in self.matrices if matrix.inside) or self.matrices

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros in the counted matrices together. None if there are none."""
        entries = sum(math.prod(matrix.shape) for matrix in self.counted)
        return sum(matrix.zeros for matrix in self.counted) / entries if entries else None

    @property
    def pattern(self) -> str | None:
        """The n:m of the sparse counted matrices, if it is the same in all of them."""
        found = {matrix.pattern for matrix in self.counted if matrix.sparsity > 0.01}
        return found.pop() if len(found) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return asdict(self) | {"sparsity": self.sparsity, "pattern": self.pattern}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in self.entries.items())
        lines = [f"{self.source}: {self.kind}, {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB ({dtypes})"]
        if self.adapter is not None:
            lines += str(self.adapter).splitlines()
        lines += [f"note: {note}" for note in self.notes]
        if self.sparsity is not None:
            pattern = f", all {self.pattern}" if self.pattern else ""
            place = "inside of blocks" if self.counted != self.matrices else "in all"
            lines.append(f"sparsity {self.sparsity:.4f} of {len(self.counted)} matrices {place}{pattern}")
            lines += ["", *_table(self.counted)]
        outside = [matrix for matrix in self.matrices if matrix not in self.counted]
        if outside:
            lines += ["", "outside of blocks", *_table(outside)]
        return "\n".join(lines)


def in_order(matrices: list[MatrixInspection]) -> tuple[MatrixInspection, ...]:
    """Return matrices in the order of their names, in which 2 comes before 10."""
    return tuple(sorted(matrices, key=lambda matrix: [part.zfill(9) for part in matrix.name.split(".")]))


def _table(matrices: tuple[MatrixInspection, ...] | list[MatrixInspection]) -> list[str]:
    width = max(len(matrix.name) for matrix in matrices)
    shapes = ["x".join(map(str, matrix.shape)) for matrix in matrices]
    wide = max(map(len, [*shapes, "shape"]))
    patterns = [matrix.pattern or "-" for matrix in matrices]
    long = max(map(len, [*patterns, "n:m"]))
    head = f"{'matrix':<{width}}  {'shape':<{wide}}  {'dtype':<5}  sparsity  {'n:m':<{long}}  fingerprint"
    return [
        head,
        *(
            f"{matrix.name:<{width}}  {shape:<{wide}}  {matrix.dtype:<5}  {matrix.sparsity:<8.4f}  {pattern:<{long}}  "
            f"{matrix.fingerprint}"
            for matrix, shape, pattern in zip(matrices, shapes, patterns, strict=True)
        ),
    ]

"""The task of a reconstruction: what is pruned and fitted and how, also in words and hashes, and its report."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from peft import PeftConfig
from torch import nn

from ..calibration.activations import Activations
from ..calibration.inputs import fingerprint_of_inputs, in_words
from ..model.blocks import prunable_weights
from ..model.environment import peak_memory
from ..model.processes import place
from ..model.weights import WeightView
from ..pruning.task import PruningTask
from .fit import Fit
from .progress import fingerprint_of_model
from .regions import RegionSize
from .report import ReconstructionReport, RegionReport


Mode = Literal["DD", "SS", "SD"]


@dataclass(frozen=True)
class ReconstructionTask:
    """What a reconstruction does.

    Args:
        model, dense, fit, mode, activations: the arguments of `reconstruct`.
        pruning: what is pruned and how.
        size: the argument `region` of `reconstruct`.
    """

    model: nn.Module
    dense: nn.Module | None
    pruning: PruningTask
    fit: Fit
    size: RegionSize
    mode: Mode
    activations: Activations

    @cached_property
    def dense_weights(self) -> dict[str, WeightView] | None:
        """The weights of `dense` by name, if there is a `dense`."""
        return None if self.dense is None else prunable_weights(self.dense)

    def report(self, regions: tuple[RegionReport, ...], seconds: float) -> ReconstructionReport:
        """Return the report of the reconstruction.

        Args:
            regions: the reports of the regions, in the order of the model.
            seconds: how long it took.
        """
        tuner = self.fit.tuner
        return ReconstructionReport(
            region=str(self.size),
            mode=self.mode,
            loss=self.fit.loss,
            tuner=tuner if isinstance(tuner, str) else str(getattr(tuner.peft_type, "value", tuner.peft_type)),
            seconds=seconds,
            peak_memory=peak_memory(),
            pruning=self.pruning.report(seconds) if self.dense is None else None,
            regions=regions,
        )

    def in_words(self, inputs: list[dict[str, Any]]) -> str:
        """Return the task in words, by which several processes compare what they were asked to do.

        Args:
            inputs: the calibration data as model inputs.
        """
        if place()[1] == 1:
            return ""
        pruning = self.pruning
        models = [fingerprint_of_model(model) for model in (self.model, self.dense) if model is not None]
        patterns = hashlib.blake2b(_stable_text(pruning.patterns).encode(), digest_size=8).hexdigest()
        return (
            f"to fit {len(pruning.weights)} weights, pruned to {pruning.pattern} (hash {patterns}), by "
            f"{in_words(inputs)}, in models of hash {' and '.join(models)}, with {self._choices()}"
        )

    def fingerprint(self, inputs: list[dict[str, Any]]) -> dict[str, str]:
        """Return the hashes and texts that must be equal for the finished regions of an earlier run to be reused.

        Args:
            inputs: the calibration data as model inputs.
        """
        return {
            "model": fingerprint_of_model(self.model),
            "dense model": "" if self.dense is None else fingerprint_of_model(self.dense),
            "data": fingerprint_of_inputs(inputs),
            "arguments": f"{_stable_text(self.pruning.patterns)} {self._choices()}",
        }

    def _choices(self) -> str:
        """Return the arguments, but for patterns, as text that is the same in every process."""
        pruning = self.pruning
        allocation = dict(pruning.allocation) if isinstance(pruning.allocation, Mapping) else pruning.allocation
        of_pruning = (pruning.rule, pruning.group, allocation, pruning.refinement, pruning.update)
        return " ".join(map(_stable_text, (*of_pruning, self.size, self.mode, self.fit)))


def _stable_text(choice: Any) -> str:
    """Return a choice as text that is the same in every process: without addresses, and with sets in order."""
    if isinstance(choice, PeftConfig):
        fields = {key: sorted(v) if isinstance(v, set) else v for key, v in choice.to_dict().items()}
        return f"{type(choice).__name__} {fields}"
    if isinstance(choice, functools.partial):
        return f"{_stable_text(choice.func)} {choice.args} {choice.keywords}"
    if dataclasses.is_dataclass(choice) and not isinstance(choice, type):
        values = [f"{f.name}={_stable_text(getattr(choice, f.name))}" for f in dataclasses.fields(choice)]
        return f"{type(choice).__name__}({', '.join(values)})"
    return str(getattr(choice, "__qualname__", choice))

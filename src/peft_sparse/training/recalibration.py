"""Measures the statistics of BatchNorms anew for a trainer, after pruning and after the recovery."""

import contextlib
import logging
from collections.abc import Iterator

from torch import nn
from transformers import Trainer, set_seed

from ..calibration.norms import NormsReport, norms_with_statistics, recalibrate_norms
from ..tuners.layer import SparseLoraLayer
from .base_weights import adapted_layers
from .calibration_samples import first_samples
from .endings import same_random_numbers


logger = logging.getLogger(__name__)


class Recalibration:
    """Calls `recalibrate_norms` on samples of a trainer.

    Args:
        trainer: the trainer, with its model if it has one already, its data and its collator.

    Raises:
        ValueError: the training is parallel by FSDP or DeepSpeed; the model has no layer with running statistics;
            there is no data set, or it has fewer samples than `calibration_samples`.
    """

    def __init__(self, trainer: Trainer) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "`recalibrate_norms` runs the whole model in each process, and FSDP and DeepSpeed divide it among "
                "processes. Train in one process or with DDP, or set `recalibrate_norms=False` and call the function "
                "`recalibrate_norms` on the saved model."
            )
        if isinstance(trainer.model, nn.Module):
            # Otherwise a model without such layers would be refused after it was pruned.
            norms_with_statistics(trainer.model)
        self.seed = trainer.args.seed
        self.samples = first_samples(trainer, trainer.args.eval_batch_size, spread=True)
        self.report: NormsReport | None = None

    def __call__(self, model: nn.Module) -> None:
        """Measure the statistics of `model` anew, as it computes with its adapters merged."""
        with same_random_numbers(), _merged(model):
            # The transforms of a data set draw random numbers, which must be the same in every process.
            set_seed(self.seed)
            self.report = recalibrate_norms(model, self.samples)
        logger.info("%s", self.report)


@contextlib.contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Merge the adapters of this package within the context. What merging rounds or masks is then measured too."""
    merged: list[SparseLoraLayer] = []
    try:
        for _, layer in adapted_layers(model):
            if not layer.merged and not layer.disable_adapters:
                layer.merge()
                # A layer that the active adapter leaves out is not merged.
                merged += [layer] if layer.merged else []
        yield
    finally:
        for layer in merged:
            layer.unmerge()

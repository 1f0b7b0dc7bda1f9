"""The samples of a trainer that calibration and reconstruction use."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from ..calibration.collation import TOKEN_MASKS


def first_samples(trainer: Trainer, batch_size: int) -> "FirstSamples":
    """Return the first `calibration_samples` samples of the calibration set, else of the training set.

    Args:
        trainer: the trainer, with its data collator.
        batch_size: samples in a batch.

    Raises:
        ValueError: there is no data set, or it has fewer samples.
    """
    own: Any = trainer
    count = own.args.calibration_samples
    name = "train_dataset" if own.calibration_dataset is None else "calibration_dataset"
    dataset: Any = getattr(own, name)
    if dataset is None:
        raise ValueError(
            f"Calibration uses the first {count} samples of `train_dataset`, and there is none. Pass `train_dataset` "
            "or `calibration_dataset`."
        )
    if isinstance(dataset, IterableDataset):
        dataset = list(itertools.islice(dataset, count))
    if len(dataset) < count:
        what = "training" if name == "train_dataset" else "calibration"
        raise ValueError(
            f"`calibration_samples={count}` needs as many {what} samples, and `{name}` has only {len(dataset)}. Lower "
            "`calibration_samples`, or pass a larger data set."
        )
    return FirstSamples(dataset, _collator(own, dataset[0]), count, batch_size)


def _collator(trainer: Any, sample: Any) -> Any:
    """Return the data collator of a trainer for samples such as `sample`.

    `Trainer` removes what the model does not take. Masks that say which tokens count are kept for calibration.
    """
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration")
    masks = [name for name in TOKEN_MASKS if isinstance(sample, Mapping) and name in sample]
    if isinstance(collator, RemoveColumnsCollator) and masks:
        collator = copy.copy(collator)
        collator.signature_columns = [*collator.signature_columns, *masks]
    return collator


class FirstSamples:
    """The first samples of a data set, collated in batches, in the same order in every process.

    Args:
        dataset: the samples, by index.
        collator: makes a batch of a list of samples.
        count: how many samples.
        batch_size: samples in a batch.
    """

    def __init__(self, dataset: Any, collator: Any, count: int, batch_size: int) -> None:
        self.dataset, self.collator, self.count, self.batch_size = dataset, collator, count, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.count, self.batch_size):
            yield self.collator([self.dataset[i] for i in range(start, min(start + self.batch_size, self.count))])

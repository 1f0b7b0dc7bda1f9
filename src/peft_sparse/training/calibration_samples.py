"""The samples of a trainer that calibration and reconstruction use."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from ..calibration.collation import TOKEN_MASKS


def first_samples(trainer: Trainer, batch_size: int, spread: bool = False) -> "Samples":
    """Return the first `calibration_samples` samples of the calibration set, else of the training set.

    Args:
        trainer: the trainer, with its data collator.
        batch_size: samples in a batch.
        spread: return as many samples that are evenly spaced over the data set, instead of the first ones. Where a
            data set is sorted by class, the first ones are of one class. A set that is a stream gives its first ones.

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
    indices = [i * len(dataset) // count for i in range(count)] if spread else range(count)
    return Samples(dataset, _collator(own, dataset[0]), indices, batch_size)


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


class Samples:
    """Samples of a data set, collated in batches, in the same order in every process.

    Args:
        dataset: the samples, by index.
        collator: makes a batch of a list of samples.
        indices: which samples.
        batch_size: samples in a batch.
    """

    def __init__(self, dataset: Any, collator: Any, indices: Sequence[int], batch_size: int) -> None:
        self.dataset, self.collator, self.indices, self.batch_size = dataset, collator, indices, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.collator([self.dataset[i] for i in self.indices[start : start + self.batch_size]])

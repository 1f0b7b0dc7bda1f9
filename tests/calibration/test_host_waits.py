"""How often the host would wait for a device. On CPUs nothing waits, but the operations that would are the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_sparse import prune, reconstruct
from peft_sparse.pruning import patterns
from peft_sparse.pruning.least_squares import LeastSquares
from peft_sparse.pruning.patterns import Unstructured
from peft_sparse.pruning.sparsegpt import sparsegpt

from conftest import VOCABULARY, tiny


# Their results, or the shapes of their results, depend on values.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        if name in WAITING or by_mask:
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def data(batches, padding):
    tokens = torch.randint(0, VOCABULARY, (batches, 12))
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    return [
        {"input_ids": tokens[i : i + 1]} | ({"attention_mask": mask[i : i + 1]} if padding else {})
        for i in range(batches)
    ]


def waits(work, batches, blocks, padding):
    model = tiny("llama")
    model.model.layers = model.model.layers[:blocks]
    calibration = data(batches, padding)
    with Waits() as counted:
        work(model, calibration)
    return counted.count


WORKS = {
    "wanda": lambda model, batches: prune(model, 0.5, batches, criterion="wanda"),
    "update": lambda model, batches: prune(
        model, 0.5, batches, criterion="sparsegpt", update=LeastSquares(max_iterations=2)
    ),
    "reconstruct": lambda model, batches: reconstruct(model, pattern=0.5, calibration=batches, criterion="wanda"),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("work", WORKS)
def test_blocks_do_not_wait_for_each_batch(work, padding):
    """A batch makes the host wait where its calls are recorded, once, and not again in each block or step."""
    by_batch = []
    for blocks in (1, 2):
        few, many = (waits(WORKS[work], batches, blocks, padding) for batches in (3, 5))
        by_batch.append({name: many[name] - few.get(name, 0) for name in many})
    assert by_batch[0] == by_batch[1]
    assert sum(by_batch[0].values()) <= 2 * (12 if padding else 5)


def test_a_weight_makes_the_host_wait_a_fixed_number_of_times():
    for columns in (64, 256):
        rows = torch.randn(512, columns)
        with Waits() as counted:
            sparsegpt(torch.randn(32, columns), rows.T @ rows, Unstructured(0.5))
        assert counted.count["_local_scalar_dense"] == 2, "the factor, and whether the result is finite"


def test_ties_are_found_alike_where_the_host_does_not_wait():
    scores = torch.randint(0, 4, (20, 30)).float()
    for count in (1, 11, 30):
        threshold = scores.kthvalue(count, dim=1, keepdim=True).values
        chosen = scores <= threshold
        without = patterns._without_surplus(scores == threshold, chosen.sum(1) - count)
        assert torch.equal(chosen & without, patterns.lowest(scores, count))


def test_this_counter_counts():
    with Waits() as counted:
        x = torch.ones(3)
        x[x > 0].sum().item()
        x.nonzero()
    assert counted.count == {"index": 1, "_local_scalar_dense": 1, "nonzero": 1}

"""What is asked of a device while blocks run: what a batch takes is expected ahead, and blocks are moved once."""

import collections
import contextlib
import sys

import pytest
import torch
import transformers

from peft_sparse import Fit, prune, reconstruct
from peft_sparse.calibration.activations import ActivationStore
from peft_sparse.calibration.residence import staying

from conftest import inputs_of, tiny


def batches(name, count):
    """Batches of different lengths, some of whose tokens are padding."""
    made = []
    for number in range(count):
        batch = inputs_of("llama" if name == "t5 encoder" else name, 2)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, : number + 1] = 0
        made.append(batch | {"attention_mask": mask})
    return made


def pruned(model, data, **options):
    prune(model, 0.5, data, criterion="wanda", **options)


def reconstructed(model, data, mode="SS", **options):
    fit = Fit(max_steps=5, gradient_accumulation_steps=2)
    reconstruct(model, pattern=0.5, calibration=data, criterion="wanda", mode=mode, fit=fit, **options)


WORKS = [
    ("llama", pruned, {}),
    ("t5", pruned, {}),
    ("mixtral", pruned, {}),
    ("llama", reconstructed, {}),
    ("llama", reconstructed, {"mode": "DD"}),
    ("llama", reconstructed, {"mode": "SD", "region": "block"}),
    ("llama", reconstructed, {"region": "matrix"}),
    ("llama", reconstructed, {"region": 2}),
    ("t5", reconstructed, {}),
    ("gpt_neox", reconstructed, {}),
]


class Asked:
    """Notes what stores are asked for within `overlapping()`. On a CPU they have nothing to copy."""

    def __init__(self, monkeypatch):
        self.open, self.ahead, self.useless = {}, [], 0
        for name in ("overlapping", "expect", "get"):
            monkeypatch.setattr(ActivationStore, name, self.noting(name, getattr(ActivationStore, name)))

    def noting(self, name, own):
        def overlapping(store):
            @contextlib.contextmanager
            def context():
                assert store not in self.open, "a context within a context ends what the outer one promises"
                expected = self.open[store] = {}
                try:
                    with own(store):
                        yield
                    self.useless += len(expected)
                finally:
                    del self.open[store]

            return context()

        def expect(store, kept, device):
            self.open[store][id(kept)] = kept
            return own(store, kept, device)

        def get(store, kept, device=None):
            if store in self.open:
                self.ahead.append(self.open[store].pop(id(kept), None) is not None)
            return own(store, kept, device)

        return {"overlapping": overlapping, "expect": expect, "get": get}[name]


@pytest.mark.parametrize(("name", "work", "options"), WORKS)
def test_what_a_batch_takes_is_expected_ahead_and_nothing_is_expected_in_vain(name, work, options, monkeypatch):
    asked = Asked(monkeypatch)
    work(tiny(name), batches(name, 6), **options)
    assert asked.useless == 0
    # What several calls take, or several batches, is expected once.
    assert sum(asked.ahead) >= 0.6 * len(asked.ahead) > 0
    assert not asked.open


def test_an_error_ends_what_is_expected(monkeypatch):
    asked = Asked(monkeypatch)

    def fail(module, args, kwargs, output):
        if asked.open:
            raise KeyError("in the middle")

    model = tiny("llama")
    model.model.layers[1].mlp.register_forward_hook(fail, with_kwargs=True)
    for work in (pruned, reconstructed):
        with pytest.raises(KeyError, match="in the middle"):
            work(model, batches("llama", 3))
        assert not asked.open


@pytest.mark.parametrize(
    ("name", "work", "options"), [*WORKS, ("t5 encoder", pruned, {}), ("t5 encoder", reconstructed, {})]
)
def test_how_often_a_block_is_moved_does_not_depend_on_the_number_of_batches(name, work, options, monkeypatch):
    counts = []
    for number in (3, 6):
        moves = collections.Counter()

        def on_device(device, moves=moves):
            @contextlib.contextmanager
            def resident(name, block):
                moves[name] += 1
                yield

            return resident

        for module in ("pruning.prune", "reconstruction.reconstruct"):
            monkeypatch.setattr(sys.modules[f"peft_sparse.{module}"], "on_device", on_device)
        model = transformers.T5EncoderModel(tiny("t5").config) if name == "t5 encoder" else tiny(name)
        work(model, batches(name, number), **options)
        counts.append(moves)
    more = {block: count - counts[0][block] for block, count in counts[1].items()}
    # While the calls of a decoder are recorded, the encoder runs on each batch, and the first block of the decoder,
    # which computes the biases of the others.
    recorded = {"encoder.block.0", "encoder.block.1", "decoder.block.0"} if name == "t5" else set()
    assert more == {block: 3 * (block in recorded) for block in counts[0]}
    assert max(counts[0].values()) <= 12


def test_a_block_stays_until_another_one_is_needed_and_while_it_runs():
    told = []

    @contextlib.contextmanager
    def residence(name, block):
        told.append(f"+{name}")
        yield
        told.append(f"-{name}")

    a, b = torch.nn.Identity(), torch.nn.Identity()
    with staying(residence) as resident:
        for name, block in (("a", a), ("a", a), ("b", b)):
            with resident(name, block):
                told.append(name)
        # A block that calls another one stays meanwhile.
        with resident("b", b), resident("a", a):
            told.append("a in b")
        with resident("b", b):
            told.append("b")
    assert " ".join(told) == "+a a a -a +b b +a a in b -a b -b"

"""Copies beside the computation, on a simulated GPU that does what it is asked for as late, or as early, as it may."""

import contextlib
import random
import sys
import weakref

import pytest
import torch

from peft_sparse.calibration.copies import Copies, ahead


# Only the name of the simulated one.
GPU = torch.device("cpu")
SIZE = 4


class Event:
    def __init__(self, machine):
        self.machine, self.happened = machine, False

    def synchronize(self):
        self.machine.work(until=lambda: self.happened)


class Stream:
    """A queue of what a GPU was asked for: (event to wait for, action), in order."""

    def __init__(self, machine):
        self.machine, self.queue = machine, []
        machine.streams.append(self)

    def record_event(self):
        event = Event(self.machine)
        self.queue.append((None, lambda: setattr(event, "happened", True)))
        return event

    def wait_event(self, event):
        self._wait(event, sys._getframe(1).f_code.co_name)

    def wait_stream(self, other):
        self._wait(other.record_event(), sys._getframe(2).f_code.co_name)

    def _wait(self, event, place):
        self.machine.waits.add(place)
        if place != self.machine.left_out:
            self.queue.append((event, lambda: None))


class Machine:
    """One GPU. Its memory is given to the next tensor as soon as the host drops one, as by torch's allocator.

    Args:
        seed: decides which stream goes on. 0 lets the later stream go on as far as it can, -1 the first.
        left_out: the name of the function of `Copies` whose waits are ignored.
    """

    def __init__(self, seed, left_out=None):
        self.seed, self.random, self.left_out = seed, random.Random(seed), left_out
        self.streams, self.free, self.waits, self.taken = [], [], set(), 0
        self.current = Stream(self)

    def copy(self, to, source):
        to, source = to.numpy(), source.numpy()
        self.current.queue.append((None, lambda: to.__setitem__(slice(None), source)))

    def empty(self):
        """Return memory of the GPU that nobody holds."""
        memory = self.free.pop() if self.free else self._more()
        tensor = torch.from_numpy(memory)
        weakref.finalize(tensor, self.free.append, memory)
        return tensor

    def _more(self):
        self.taken += 1
        return torch.full((SIZE,), torch.nan).numpy()

    def launch(self, out, function, *inputs):
        """Ask the GPU to compute. The queue holds memory, but no tensors: the host may drop these at once."""
        to, arrays = out.numpy(), [tensor.numpy() for tensor in inputs]
        self.current.queue.append((None, lambda: to.__setitem__(slice(None), function(*arrays))))

    def work(self, until=lambda: False):
        while not until():
            able = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].happened)]
            if not able:
                assert not any(stream.queue for stream in self.streams), "two streams wait for each other"
                return
            chosen = able[-1] if self.seed == 0 else able[0] if self.seed == -1 else self.random.choice(able)
            chosen.queue.pop(0)[1]()

    @contextlib.contextmanager
    def using(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def machine(monkeypatch, seed, left_out=None):
    simulated = Machine(seed, left_out)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(simulated))
    monkeypatch.setattr(torch.cuda, "stream", simulated.using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: simulated.current)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(torch, "empty_like", lambda source, device: simulated.empty())
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source, non_blocking: simulated.copy(to, source))
    return simulated


BATCHES, BLOCKS = 5, 3


def take_through(simulated, copies, rooms, fail_at=None):
    """Take all batches through all blocks, as runners do: a block is run to measure, and then to go on.

    A block computes 2 x + 1, by a value that is soon dropped. The sum of all x is measured, in the last of `rooms`.
    """
    total = simulated.empty()
    simulated.launch(total, lambda: 0)

    def expect(number):
        copies.expect(rooms[number], GPU)

    for block in range(BLOCKS):
        with copies.overlapping():
            for number in ahead(range(BATCHES), expect):
                inputs = copies.fetch(rooms[number], GPU)
                simulated.launch(total, lambda total, x: total + x, total, inputs)
                del inputs
        with copies.overlapping():
            for number in ahead(range(BATCHES), expect):
                inputs = copies.fetch(rooms[number], GPU)
                between, outputs = simulated.empty(), simulated.empty()
                simulated.launch(between, lambda x: 2 * x, inputs)
                del inputs
                if (block, number) == fail_at:
                    raise ValueError("in the middle")
                simulated.launch(outputs, lambda x: x + 1, between)
                copies.write(outputs, rooms[number])
                del between, outputs
                # Something else is computed, in memory that was just let go.
                others = [simulated.empty(), simulated.empty()]
                for other in others:
                    simulated.launch(other, lambda: torch.nan)
                del other, others
    copies.write(total, rooms[-1])


def new_rooms():
    return [torch.full((SIZE,), float(number)) for number in range(BATCHES + 1)]


def results(monkeypatch, seed, left_out=None):
    simulated, copies, rooms = machine(monkeypatch, seed, left_out), Copies(), new_rooms()
    take_through(simulated, copies, rooms)
    copies.wait()
    return [room.tolist() for room in rooms], simulated


STATES = [[(number + 1) * 2**block - 1 for number in range(BATCHES)] for block in range(BLOCKS + 1)]
RIGHT = [[float(value)] * SIZE for value in (*STATES[-1], sum(map(sum, STATES[:-1])))]
SEEDS = range(-1, 30)
PLACES = ["_begin", "fetch", "write", "_let_go"]


def test_results_are_right_in_whatever_order_streams_go_on(monkeypatch):
    for seed in SEEDS:
        found, simulated = results(monkeypatch, seed)
        assert found == RIGHT
        assert simulated.waits >= {*PLACES}
        # The sum, the inputs, those of the next batch, the value between, the outputs, and those that leave.
        assert simulated.taken <= 6


@pytest.mark.parametrize("left_out", PLACES)
def test_without_one_of_its_waits_results_would_be_wrong(left_out, monkeypatch):
    assert any(results(monkeypatch, seed, left_out)[0] != RIGHT for seed in SEEDS)


@pytest.mark.parametrize("fail_at", [(0, 0), (1, 2), (2, BATCHES - 1)])
def test_after_an_error_no_copy_is_pending_and_the_stream_is_the_same(fail_at, monkeypatch):
    def after_an_error(seed, left_out=None):
        simulated, copies, rooms = machine(monkeypatch, seed, left_out), Copies(), new_rooms()
        computing = simulated.current
        with pytest.raises(ValueError, match="in the middle"):
            take_through(simulated, copies, rooms, fail_at)
        assert simulated.current is computing
        assert not copies._arriving
        assert not copies._leaving
        # All memory of the GPU is free, and belongs to what is computed next.
        assert len(simulated.free) == simulated.taken
        own = [simulated.empty() for _ in range(simulated.taken)]
        for tensor in own:
            simulated.launch(tensor, lambda: 0.5)
        simulated.work()
        return all(tensor.tolist() == [0.5] * SIZE for tensor in own)

    assert all(after_an_error(seed) for seed in SEEDS)
    if fail_at[1] < BATCHES - 1:
        assert not all(after_an_error(seed, "overlapping") for seed in SEEDS)


def test_the_next_batch_arrives_and_the_last_one_leaves_while_a_batch_is_computed(monkeypatch):
    simulated, copies, rooms = machine(monkeypatch, -1), Copies(), new_rooms()
    with copies.overlapping():
        in_order = ahead(range(3), lambda i: copies.expect(rooms[i], GPU))
        outputs = []
        for number in (0, 1):
            assert next(in_order) == number
            inputs = copies.fetch(rooms[number], GPU)
            # The GPU has done all but what it is asked for now, and goes on with its copies alone.
            simulated.work()
            outputs.append(simulated.empty())
            simulated.launch(outputs[-1], lambda x: x + 10, inputs)
            (copying,) = (stream for stream in simulated.streams if stream is not simulated.current)
            while copying.queue:
                copying.queue.pop(0)[1]()
            assert [there.tolist() for _, there, _ in copies._arriving.values()] == [[number + 1.0] * SIZE]
            assert simulated.current.queue, "it still computes"
            if number:
                assert rooms[0].tolist() == [10.0] * SIZE
            copies.write(outputs[-1], rooms[number])
            if not number:
                # Batch 0 is computed, and written while batch 1 is computed.
                while simulated.current.queue:
                    simulated.current.queue.pop(0)[1]()
    simulated.work()
    assert [room.tolist() for room in rooms[:2]] == [[10.0] * SIZE, [11.0] * SIZE]


def test_outside_of_the_context_nothing_is_pending(monkeypatch):
    machine(monkeypatch, 0)
    copies, rooms = Copies(), new_rooms()
    copies.expect(rooms[0], GPU)
    assert not copies._arriving
    value = copies.fetch(rooms[3], GPU)
    copies.write(value, rooms[0])
    assert not copies._leaving
    copies.wait()
    assert rooms[0].tolist() == [3.0] * SIZE


@pytest.mark.parametrize("left_out", [None, "another GPU"])
def test_a_gpu_fetches_what_another_one_has_written(left_out, monkeypatch):
    first, second = GPU, torch.device("meta")

    def fetched(seed):
        simulated, copies, (room, *_) = machine(monkeypatch, seed), Copies(), new_rooms()
        other = Stream(simulated)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: simulated.current if device == first else other
        )
        value = simulated.empty()
        simulated.launch(value, lambda: 5.0)
        copies.write(value, room)
        if left_out:
            copies._written.clear()
        there = copies.fetch(room, second)
        simulated.work()
        return there.tolist()

    assert all(fetched(seed) == [5.0] * SIZE for seed in SEEDS) == (left_out is None)


def test_each_item_is_expected_before_the_one_before_it_is_yielded():
    told = []
    for item in ahead("abc", lambda item: told.append(f"expect {item}")):
        told.append(item)
    assert told == ["expect a", "expect b", "a", "expect c", "b", "c"]
    assert list(ahead([], told.append)) == []

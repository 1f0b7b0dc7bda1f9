"""The codec gives back every bit, and its masks are those of the package."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from peft_sparse.model.masks import mask_of
from peft_sparse.sharing.codec import KINDS, decode, decode_mask, encode


FLOATS = [name for name in KINDS if name != "U8"]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-3]


def bits_of(tensor):
    return tensor.view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(list(KINDS)), share=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_any_bits_survive(data, name, share):
    kind = KINDS[name]
    size = data.draw(st.integers(0, 300))
    bits = data.draw(npst.arrays(kind.bits, size))
    bits[np.random.default_rng(size).random(size) < share] = 0
    found = decode(encode(bits, kind), size, kind)
    assert found.dtype == kind.bits
    assert found.tobytes() == bits.tobytes()


@pytest.mark.parametrize("name", FLOATS)
def test_zeros_of_either_sign_are_pruned_and_keep_their_sign(name):
    kind = KINDS[name]
    weight = torch.tensor(SPECIAL * 5).to(kind.dtype)
    bits = bits_of(weight)
    streams = encode(bits, kind)
    assert decode(streams, 40, kind).tobytes() == bits.tobytes()
    assert torch.equal(torch.from_numpy(decode_mask(streams[0], 40)), mask_of(weight.float()))


def test_half_of_a_bfloat16_weight_costs_a_bit_a_mantissa_and_a_part_of_the_exponent():
    weight = torch.randn(1 << 16).mul(0.02).bfloat16()
    weight[torch.randperm(1 << 16)[: 1 << 15]] = 0
    mask, signs, high, low = encode(bits_of(weight), KINDS["BF16"])
    assert (len(mask.data), len(signs.data), len(low.data)) == (1 << 13, 0, 1 << 15)
    assert len(high.data) < 0.36 * (1 << 15)


def test_what_repeats_takes_hardly_any_room():
    streams = encode(np.zeros(1 << 16, np.uint32), KINDS["F32"])
    assert sum(len(stream.data) for stream in streams) < 100
    ones = encode(bits_of(torch.ones(1 << 16)), KINDS["F32"])
    assert sum(len(stream.data) for stream in ones) < 1000

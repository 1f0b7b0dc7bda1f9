import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.model.masks import fingerprint, mask_, mask_of, pack, sparsity_of_fingerprint, unpack


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packing_loses_nothing(bits):
    mask = torch.tensor(bits).view(1, -1)
    assert pack(mask).numel() == -(-len(bits) // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def test_fingerprint_tells_masks_apart_and_holds_the_sparsity():
    mask = torch.rand(8, 16) > 0.25
    moved = mask.clone()
    moved[0] = mask[0].roll(1)
    assert fingerprint(mask) == fingerprint(mask.T.contiguous().T)
    assert fingerprint(mask) != fingerprint(moved)
    assert fingerprint(mask) != fingerprint(mask.view(16, 8))
    assert sparsity_of_fingerprint(fingerprint(mask)) == pytest.approx(1 - mask.float().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_masking_by_zeros_is_the_mask(dtype, values_dtype):
    tiny = torch.finfo(dtype).tiny
    # Long enough for the vectorised part of a loop and its rest.
    weight = torch.tensor([0.0, -0.0, 1.5, -2.0, tiny, -tiny, tiny / 4], dtype=dtype).repeat(11)
    values = torch.randn(77, dtype=values_dtype)
    values[::7] = torch.inf
    expected = values.masked_fill(~mask_of(weight), 0)
    masked = mask_(values, weight)
    assert masked.data_ptr() == values.data_ptr()
    assert torch.equal(masked, expected)

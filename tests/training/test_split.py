"""Pairs of 16-bit values and remainders: exact where they claim it, as far off as documented where not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdq_ao.training.split import join, split

BF16, FP16 = torch.bfloat16, torch.float16


def floats(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def bits_of(x: Tensor) -> np.ndarray:
    return x.numpy().view(np.uint32)


def sample() -> Tensor:
    """All float32 exponents and signs, with lower halves around every rounding case and random ones."""
    rng = np.random.default_rng(0)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    fixed = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    lower = [np.full(1 << 16, v, np.uint32) for v in fixed]
    lower += [rng.integers(0, 1 << 16, 1 << 16, dtype=np.uint32) for _ in range(2)]
    return floats(np.concatenate([upper | part for part in lower]))


@pytest.fixture(scope="module")
def everything() -> Tensor:
    return sample()


def test_bfloat16_pairs_are_exact_for_all_exponents_signs_and_rounding_cases(everything):
    number = ~everything.isnan()
    # with and without a NaN beside it: the second takes the short way
    for x in (everything, everything[number]):
        visible, remainder = split(x, BF16)
        assert visible.dtype is BF16 and remainder.dtype is torch.int16
        back, keep = join(visible, remainder), ~x.isnan()
        assert (bits_of(back)[keep] == bits_of(x)[keep]).all()
        assert back[~keep].isnan().all() and visible[~keep].isnan().all()


def test_bfloat16_visible_value_is_the_nearest_and_ties_go_away_from_zero(everything):
    x = everything[everything.isfinite() & (everything.abs() < 3.3961775e38)]
    visible, _ = split(x, BF16)
    own = x.to(BF16)
    tie = torch.from_numpy((bits_of(x) & 0xFFFF) == 0x8000)
    assert (visible[~tie] == own[~tie]).all()
    assert (visible[tie].float().abs() > x[tie].abs()).all()
    assert (visible[tie] != own[tie]).any()  # to even, about half of them would differ: and lose their tie


@pytest.mark.parametrize(
    ("bits", "visible_bits"),
    [
        (0x00000000, 0x0000),  # +0
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),  # the smallest subnormal is visible as zero
        (0x80000001, 0x8000),
        (0x00008000, 0x0001),  # a tie among subnormals
        (0x007FFFFF, 0x0080),  # the largest subnormal is visible as the smallest normal
        (0x3F808000, 0x3F81),  # a tie above an even value: to even, the remainder would be +0x8000
        (0xBF808000, 0xBF81),
        (0x7F7F7FFF, 0x7F7F),  # the largest that is visible as a finite number
        (0x7F7F8000, 0x7F80),  # half a step above bfloat16's largest: infinity is visible
        (0x7F7FFFFF, 0x7F80),  # float32's largest
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),  # infinity itself
        (0xFF800000, 0xFF80),
    ],
)
def test_bfloat16_edges(bits, visible_bits):
    x = floats(np.array([bits]))
    visible, remainder = split(x, BF16)
    assert visible.view(torch.int16).item() & 0xFFFF == visible_bits
    assert bits_of(join(visible, remainder))[0] == bits


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_nan_of_every_kind_stays_nan(bits, dtype):
    visible, remainder = split(floats(np.array([bits, 0x3F800001])), dtype)
    assert visible[0].isnan() and join(visible, remainder)[0].isnan()
    assert join(visible, remainder)[1] == floats(np.array([0x3F800001]))[0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_remainder_left_behind_by_an_overwritten_value_makes_no_nan(dtype):
    """Someone zeroes a parameter through .data, say; the remainder is still the old one."""
    remainder = torch.tensor([-0x8000, -1, 0, 1, 0x7FFF], dtype=torch.int16)
    info = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, -3.0, info.max, -info.tiny):
        joined = join(torch.full((5,), value, dtype=dtype), remainder)
        assert ((joined - value).abs() <= info.eps * max(abs(value), info.tiny)).all(), value
    for value in (float("inf"), float("-inf")):
        assert not join(torch.full((5,), value, dtype=dtype), remainder).isnan().any()
    assert join(torch.full((5,), torch.nan, dtype=dtype), remainder).isnan().all()


def test_float16_visible_value_is_torchs_own_cast(everything):
    x = everything[~everything.isnan()]
    visible, _ = split(x, FP16)
    assert torch.equal(visible, x.to(FP16))


def test_float16_pairs_are_exact_where_documented(everything):
    size = everything.abs()
    x = everything[(size >= 2.0**-16) & (size < 65520)]
    assert len(x) > 60_000
    assert (bits_of(join(*split(x, FP16))) == bits_of(x)).all()


def test_float16_pairs_of_small_values_are_the_nearest_multiple(everything):
    x = torch.cat([everything[everything.abs() < 2.0**-16], torch.randn(20_000) * 1e-6])
    back = join(*split(x, FP16))
    expected = np.round(x.double().numpy() * 2.0**39) / 2.0**39
    assert (back.double().numpy() == expected).all()
    assert (back.double() - x.double()).abs().max() <= 2.0**-40


def test_float16_has_no_room_beyond_its_range():
    x = torch.tensor([65519.996, 65520.0, 1e30, float("inf"), -65520.0])
    assert join(*split(x, FP16)).tolist() == [x[0].item(), *[float("inf")] * 3, float("-inf")]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_remainder_is_the_difference_in_steps(dtype):
    """Against exact fractions: remainder * step = x - visible."""
    x = (1 + torch.rand(300)) * 2.0 ** torch.randint(-16, 15, (300,)) * (torch.randint(0, 2, (300,)) * 2 - 1)
    visible, remainder = split(x, dtype)
    for exact, v, r in zip(x.tolist(), visible, remainder.tolist(), strict=True):
        step = Fraction(2) ** (int(np.floor(np.log2(abs(exact)))) - 23)
        if dtype is FP16:
            step = Fraction(2) ** (max(int(np.floor(np.log2(abs(v.item())))), -14) - 10 - 15)
        sign = -1 if dtype is BF16 and exact < 0 else 1  # bfloat16's counts bits, which grow away from zero
        assert Fraction(v.item()) + sign * r * step == Fraction(exact)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_any_shape_and_layout(dtype):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    visible, remainder = split(x, dtype)
    assert visible.stride() == remainder.stride() == x.stride()
    assert torch.equal(join(visible, remainder), x)
    empty = split(torch.empty(0), dtype)
    assert join(*empty).shape == (0,)

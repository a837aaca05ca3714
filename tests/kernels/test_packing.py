import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inductor_kernels import packing


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4]), st.integers(0, 3), st.integers(1, 3), st.integers(1, 33), st.integers(0, 2**31))
def test_round_trip(bits, dims, rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*[rows] * dims, length), dtype=torch.uint8, generator=generator)
    packed = packing.pack(codes, bits)
    assert packed.shape[-1] == packing.packed_length(length, bits) == -(-length * bits // 8)
    assert torch.equal(packing.unpack(packed, bits, length), codes)


def test_short_rows_are_little_end_first():
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert packing.pack(codes[:2], 4).tolist() == [0x21]
    assert packing.pack(codes, 2).tolist() == [0b00111001]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("bytes_, run", [(1, 1), (3, 1), (6, 2), (20, 4), (24, 8), (16, 16), (48, 16), (80, 16)])
def test_every_byte_of_a_run_holds_codes_a_run_apart(bits, bytes_, run):
    fields = 8 // bits
    codes = torch.randint(0, 2**bits, (bytes_ * fields,), dtype=torch.uint8)
    assert packing.run_length(len(codes), bits) == run
    for at, byte in enumerate(packing.pack(codes, bits).tolist()):
        first = at // run * run * fields + at % run
        assert byte == sum(codes[first + run * f].item() << (bits * f) for f in range(fields))


@pytest.mark.parametrize("bits", [2, 4])
def test_unpack_weight_subtracts_the_zero_point_of_each_channel(bits):
    codes = torch.randint(0, 2**bits, (3, 2, 2, 5), dtype=torch.uint8)
    zero_point = torch.tensor([0, 1, 2**bits - 1], dtype=torch.int8)
    w = packing.unpack_weight(packing.pack(codes, bits), zero_point, bits, 5)
    assert w.dtype == torch.int8
    assert torch.equal(w, codes.to(torch.int8) - zero_point.view(3, 1, 1, 1))


def test_errors_name_the_argument():
    codes = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits=3"):
        packing.pack(codes, 3)
    with pytest.raises(TypeError, match="codes: torch.int8"):
        packing.pack(codes.to(torch.int8), 4)
    with pytest.raises(TypeError, match="packed: .*4 bytes for length=7"):
        packing.unpack(codes[:, :3], 4, 7)
    with pytest.raises(TypeError, match="weight_zero_point"):
        packing.unpack_weight(codes, None, 4, 8)


def test_compiles_without_a_break():
    codes = torch.randint(0, 16, (3, 7), dtype=torch.uint8)
    round_trip = torch.compile(lambda c: packing.unpack(packing.pack(c, 4), 4, 7), fullgraph=True, backend="aot_eager")
    assert torch.equal(round_trip(codes), codes)

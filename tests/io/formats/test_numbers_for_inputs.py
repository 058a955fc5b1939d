"""What formats store for the inputs of a Linear, from the largest one of calibration, and how inputs are rounded by it."""

from __future__ import annotations

import pytest
import torch

from bigq.io.formats import FORMATS, STATIC, Format, PackedLinear, format_of
from bigq.io.formats.readers import Written, read_by, verdicts
from bigq.io.formats.readers_table import Kind
from bigq.model.forward.quantized_inputs import rounded_to_e2m1, rounded_to_e4m3, rounded_to_int8

W4A4 = FORMATS["nvfp4-w4a4"]
each_format = pytest.mark.parametrize("made", [*STATIC.values(), W4A4], ids=lambda made: made.name)


@each_format
def test_numbers_are_positive_and_so_are_their_inverses(made: Format) -> None:
    largest_number = {"w8a8-int8": 127.0, "fp8": 448.0, "nvfp4-w4a4": 2688.0}[made.name]
    for largest in (0.0, 1e-45, 1e-37, 3.7, 65504.0, 3.4e38):
        (number,) = made.pack_inputs("x", largest).values()
        assert number.dtype == torch.float32 and number.shape == (1,)
        assert bool(torch.isfinite(number)) and float(number) > 0 and bool(torch.isfinite(1 / number))
        if largest == 3.7:
            exact = largest_number / largest if made is W4A4 else largest / largest_number
            assert float(number) == pytest.approx(exact, rel=1e-6)
        if largest == 0:
            assert float(number) == 1


@each_format
def test_the_layout_has_it_last(made: Format) -> None:
    linear = PackedLinear(bits=8, outputs=32, inputs=64, groups=4 if made is W4A4 else 1)
    assert list(made.layout("x", linear, True, torch.bfloat16).items())[-1] == (f"x.{made.input_suffix}", (torch.float32, (1,)))
    assert list(made.suffixes(True))[-1] == made.input_suffix


def test_other_formats_store_none() -> None:
    for made in FORMATS.values():
        assert made is W4A4 or made.pack_inputs("x", None) == {}
        assert format_of(made.name, "dynamic") is made and format_of(made.name, "static") is STATIC.get(made.name, made)
    with pytest.raises(AssertionError, match="x: fp8 stores input_scale, for which calibration is needed"):
        STATIC["fp8"].pack_inputs("x", None)


def test_8_bits_by_one_scale() -> None:
    x = torch.tensor([[0.6, -0.5, 1.5, 2.5, 127.0, 130.0, -128.0, -140.0]])
    assert rounded_to_int8(x, torch.ones(1)).tolist() == [[1, 0, 2, 2, 127, 127, -128, -128]]
    assert rounded_to_int8(x, torch.tensor([2.0])).tolist() == [[0, 0, 2, 2, 128, 130, -128, -140]]
    y = torch.tensor([[1.0, 17.0, 19.0, 500.0, -500.0, 0.0]])
    assert rounded_to_e4m3(y, torch.ones(1)).tolist() == [[1, 16, 20, 448, -448, 0]]
    assert rounded_to_e4m3(y, torch.tensor([2.0])).tolist() == [[1, 16, 20, 512, -512, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bits_in_groups(dtype: torch.dtype) -> None:
    """Ties go to even numbers; groups of zeros stay so; a group whose scale is beyond E4M3 is cut off."""
    first = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, 0.3, 0.7, 2.6, 3.4, 5.1]
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, -4.0, 0.5, 0.5, 3.0, 3.0, 6.0]
    x = torch.tensor([[*first, *[0.0] * 16], [*[12.0 * value for value in first], *[6e4] * 16]]).to(dtype)
    found = rounded_to_e2m1(x, torch.ones(1))
    assert found.dtype == torch.float32
    assert found[0].tolist() == [*expected, *[0.0] * 16]
    assert found[1].tolist() == [*[12.0 * value for value in expected], *[448.0 * 6] * 16]


def test_4_bits_are_near_their_inputs() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = rounded_to_e2m1(x, torch.tensor([2688.0]) / x.abs().max())
    groups, largest = found.view(-1, 16), x.view(-1, 16).abs().amax(1)
    assert all(len(group.abs().unique()) <= 8 for group in groups)
    assert bool(((x - found).abs().view(-1, 16).amax(1) <= largest * (1 / 6 + 1 / 16)).all())


def test_transformers_rounds_static_inputs_of_opt_right() -> None:
    kind = Kind(8, -1, True)
    for form in STATIC:
        loads = {
            static: read_by(verdicts(Written(format=form, base=kind, kinds=frozenset([kind]), family="opt", static=static)))
            for static in (False, True)
        }
        assert not any(name.startswith("transformers") for name in loads[False])
        assert any(name.startswith("transformers") for name in loads[True]) and any(name.startswith("vLLM") for name in loads[True])

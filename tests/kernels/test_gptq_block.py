"""The column loop, against one that works weight by weight in Python floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from by_hand import TINY, column_loop
from checks import FACTOR, ORDERS, OTHER_CODES, VERSIONS, as_good, distance, kernel, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels.gptq_block import gptq_block_
from bigq.kernels.grid import GridSpec, GroupGrid

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SYMMETRIC = GridSpec(bits=4, symmetric=True)

#: The results of the kernel.
RESULTS = ("codes", "target", "work", "loss", "scale", "zero")


@dataclass(frozen=True, kw_only=True)
class Block:
    """The arguments of ``gptq_block_``, in fp64 until ``to``."""

    target: Tensor
    u: Tensor
    work: Tensor
    spec: GridSpec
    scale: Tensor
    zero: Tensor
    group: Tensor
    find: bool

    def to(self, dtype: torch.dtype, device: torch.device) -> Block:
        parts = {name: getattr(self, name).to(device, dtype) for name in ("target", "u", "work", "scale", "zero")}
        return replace(self, group=self.group.to(device), **parts)

    def __getitem__(self, i: int) -> Block:
        return replace(self, **{name: getattr(self, name)[i] for name in ("target", "u", "work", "scale", "zero", "group")})


def block(k: int, m: int, spec: GridSpec = SYMMETRIC, *, width: int = 0, seed: int = 0) -> Block:
    """Rows of all sizes and offsets, among them one of zeros and some of one sign; a U with an error's way to spread.

    width: of groups whose grids are to be found, which hold NaN; 0 for grids that are given, to columns in any order.
    """
    gen = torch.Generator().manual_seed(1000 * k + m + seed)
    size = torch.logspace(-1, 0.5, m, dtype=torch.float64)[torch.randperm(m, generator=gen)]
    offset = torch.linspace(-4, 4, m, dtype=torch.float64) * size if m > 4 else 0
    target, work = (torch.randn(k, m, dtype=torch.float64, generator=gen) * size + offset for _ in range(2))
    if m > 4:
        target[:, 3] = 0
    u = 0.4 / k**0.5 * torch.randn(k, k, dtype=torch.float64, generator=gen).triu(1)
    u += torch.diag(0.5 + torch.rand(k, dtype=torch.float64, generator=gen))
    groups = k // width if width else 3
    nans = torch.full((groups, m), float("nan"), dtype=torch.float64)
    if width:
        return Block(target=target, u=u, work=work, spec=spec, scale=nans, zero=nans, group=torch.arange(k) // width, find=True)
    scale = ((0.1 + torch.rand(groups, m, dtype=torch.float64, generator=gen)) * size * 4 / 2**spec.bits).half().double()
    zero = torch.randint(spec.min_zero, 2**spec.bits, (groups, m), generator=gen).double()
    if spec.symmetric:
        zero.fill_(2 ** (spec.bits - 1))
    group = torch.randint(0, groups, (k,), generator=gen)
    return Block(target=target, u=u, work=work, spec=spec, scale=scale, zero=zero, group=group, find=False)


def stacked(blocks: list[Block]) -> Block:
    """Several matrices of one shape."""
    parts = ("target", "u", "work", "scale", "zero", "group")
    return replace(blocks[0], **{name: torch.stack([getattr(b, name) for b in blocks]) for name in parts})


def run(version: str, b: Block, order: str = "by rows") -> dict[str, Tensor]:
    """The results of a version for copies of the arguments in that memory order. Checks that nothing else changes."""
    target, u, work = (stored(t, order) for t in (b.target, b.u, b.work))
    codes = stored(torch.full(b.target.shape, 255, dtype=torch.uint8, device=u.device), order)
    scale, zero = (stored(t, "within a larger one") for t in (b.scale, b.zero))
    grid = GroupGrid(b.spec, scale, zero, b.group.to(torch.int32), b.find)
    function = gptq_block_ if version == "public" else kernel("gptq_block_", version)
    loss = function(target, u, work, codes, grid)
    assert torch.equal(u, b.u) and torch.equal(grid.group, b.group.to(torch.int32))
    assert order != "within a larger one" or all(untouched(t) for t in (target, u, work, codes))
    assert untouched(scale) and untouched(zero)
    assert b.find or (torch.equal(scale, b.scale) and torch.equal(zero, b.zero))
    return {"codes": codes, "target": target, "work": work, "loss": loss, "scale": scale, "zero": zero}


def rounded_once(b: Block) -> Block:
    """The same in fp64, with numbers as far from their values as one rounding to fp32 may put them: what no way to compute can avoid."""
    gen = torch.Generator().manual_seed(0)
    parts = {name: getattr(b, name).double() for name in ("target", "u", "work")}
    noise = {name: (torch.randint(0, 2, t.shape, generator=gen).double() * 2 - 1).to(t.device) * 2.0**-24 for name, t in parts.items()}
    return replace(b.to(torch.float64, b.u.device), **{name: t * (1 + noise[name]) for name, t in parts.items()})


def by_hand(b: Block) -> dict[str, Tensor]:
    if b.target.ndim == 3:
        each = [by_hand(b[i]) for i in range(len(b.target))]
        return {name: torch.stack([one[name] for one in each]) for name in RESULTS}
    return column_loop(b.target, b.u, b.work, b.spec, b.scale, b.zero, b.group, b.find)


def differing(result: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """bool [..., m]: columns with other codes, scales or zero points."""
    return torch.stack([(result[name].double() != other[name].double()).any(-2) for name in ("codes", "scale", "zero")]).any(0)


def check(b: Block, device: torch.device, order: str = "by rows") -> dict[str, Tensor]:
    """Triton against plain torch in fp32, and both against plain torch in fp64. Returns Triton's result.

    A loss is a sum of squares of errors, so its own error is relative to theirs. On a GPU a few columns may get other codes or grids, and
    then have other values.
    """
    single = b.to(torch.float32, device)
    got, own, exact = run("triton", single, order), run("reference", single), run("reference", single.to(torch.float64, device))
    others = [differing(got, result) for result in (own, exact)]
    same = ~(others[0] | others[1])
    assert int((~same).sum()) <= (max(1.0, OTHER_CODES * b.target.numel()) if OTHER_CODES else 0)
    # In a small matrix torch's sums may happen to be much better than the rounding of their inputs.
    nearby = run("reference", rounded_once(single))
    alike = same & ~differing(nearby, exact)
    for name in ("target", "work"):
        columns = [result[name].mT[same] for result in (got, own, exact)]
        unavoidable = distance(nearby[name].mT[alike], exact[name].mT[alike]) if bool(alike.any()) else 0.0
        assert got[name].dtype == torch.float32 and as_good(*columns, floor=max(2.0**-24, FACTOR * unavoidable)), name
    assert got["loss"].dtype == torch.float32
    own_error = distance(own["target"].mT[same], exact["target"].mT[same])
    assert distance(got["loss"][same], exact["loss"][same]) <= 2 * FACTOR * own_error + 2**-24
    assert distance(got["loss"], got["target"].double().square().sum(-2)) < 1e-6
    return got


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 6), (5, 3), (8, 7), (32, 20), (33, 5), (128, 3)])
def test_loop_equals_the_one_by_hand(k: int, m: int, symmetric: bool) -> None:
    b = block(k, m, GridSpec(bits=3, symmetric=symmetric))
    result, expected = run("reference", b), by_hand(b)
    assert torch.equal(result["codes"].double(), expected["codes"])
    for name in ("target", "work", "loss"):
        assert result[name].dtype == torch.float64
        assert torch.allclose(result[name], expected[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("search", [False, True], ids=["full", "search"])
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("k", "width"), [(8, 8), (48, 16), (96, 48), (64, 64), (40, 40)])
def test_grids_found_on_the_way_equal_those_by_hand(k: int, width: int, symmetric: bool, min_zero: int, search: bool) -> None:
    b = block(k, 6, GridSpec(bits=3, symmetric=symmetric, min_zero=min_zero, search=search), width=width)
    result, expected = run("reference", b), by_hand(b)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(result[name].double(), expected[name]), name
    assert torch.allclose(result["target"], expected["target"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("find", [False, True], ids=["given", "found"])
def test_a_batch_equals_separate_calls(find: bool) -> None:
    b = stacked([block(48, 5, width=16 * find, seed=i) for i in range(3)])
    result, expected = run("reference", b), by_hand(b)
    assert torch.equal(result["codes"].double(), expected["codes"]) and torch.equal(result["scale"], expected["scale"])
    assert torch.allclose(result["loss"], expected["loss"], rtol=1e-9) and result["loss"].shape == (3, 5)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (7, 17), (16, 16), (40, 33)])
def test_triton_with_grids_given(k: int, m: int, bits: int, symmetric: bool, device: torch.device) -> None:
    """Columns of groups in any order, as with act-order."""
    b = block(k, m, GridSpec(bits=bits, symmetric=symmetric))
    got = check(b, device)
    assert k < 16 or len(set(b.group.tolist())) > 1
    assert torch.equal(got["codes"].cpu().double(), by_hand(b.to(torch.float32, device).to(torch.float64, torch.device("cpu")))["codes"])


@pytest.mark.parametrize(("symmetric", "min_zero"), [(False, 0), (False, 1), (True, 1)], ids=["asym", "asym from 1", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "m", "width"), [(8, 1, 8), (32, 17, 16), (40, 6, 40)])
def test_triton_with_grids_found(k: int, m: int, width: int, bits: int, symmetric: bool, min_zero: int, device: torch.device) -> None:
    spec = GridSpec(bits=bits, symmetric=symmetric, min_zero=min_zero)
    got = check(block(k, m, spec, width=width), device)
    if not symmetric and m > 4:
        other = run("reference", block(k, m, replace(spec, min_zero=1 - min_zero), width=width).to(torch.float32, device))
        assert not torch.equal(got["scale"], other["scale"]) and int((got["zero"] == 0).sum() > 0) == 1 - min_zero


@pytest.mark.parametrize("scale_bits", [7, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_triton_with_coarse_scales(symmetric: bool, scale_bits: int, device: torch.device) -> None:
    """Including groups of zeros and groups below the range of fp16."""
    b = block(32, 6, GridSpec(bits=4, symmetric=symmetric, scale_bits=scale_bits), width=16)
    b.target[:, 0] = 0
    b.target[:, 1] *= 1e-9
    got = check(b, device)
    steps = got["scale"].half().view(torch.int16) % (1 << (11 - scale_bits))
    ordinary = (got["scale"] > 2**-20) & got["scale"].isfinite()
    assert int(ordinary.sum()) >= 6 and bool((steps[ordinary] == 0).all())


@pytest.mark.parametrize(
    ("k", "width", "symmetric"),
    [
        (128, 8, False), (128, 16, True), (120, 24, False), (128, 32, False), (128, 32, True), (96, 48, True), (128, 64, False),
        (96, 96, False), (104, 104, True), (128, 128, False), (128, 128, True), (127, 0, False), (128, 0, True),
    ],
)  # fmt: skip
def test_triton_with_whole_blocks(k: int, width: int, symmetric: bool, device: torch.device) -> None:
    """Groups narrower and wider than the tile of a program, and some that do not divide it."""
    check(block(k, 6, GridSpec(bits=4, symmetric=symmetric), width=width), device)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("k", "width"), [(32, 32), (48, 16)])
@pytest.mark.parametrize("bits", [2, 4])
def test_triton_with_a_grid_search(bits: int, k: int, width: int, symmetric: bool, device: torch.device) -> None:
    spec = GridSpec(bits=bits, symmetric=symmetric, search=True)
    got = check(block(k, 9, spec, width=width), device)
    plain = run("reference", block(k, 9, replace(spec, search=False), width=width).to(torch.float32, device))
    assert bool((got["scale"] < plain["scale"]).any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("case", "batch", "k"), [("given", 2, 40), ("found", 3, 16), ("search", 2, 16)])
def test_triton_with_several_matrices_in_any_memory_order(case: str, batch: int, k: int, order: str, device: torch.device) -> None:
    """The memory around them is NaN or 255, and stays unchanged."""
    spec = GridSpec(bits=3, symmetric=False, min_zero=1, search=case == "search")
    blocks = [block(k, 18 if k == 16 else 6, spec, width=8 * (case != "given"), seed=i) for i in range(batch)]
    got = check(stacked(blocks), device, order)
    alone = run("triton", blocks[-1].to(torch.float32, device), order)
    assert all(torch.equal(got[name][-1], alone[name]) for name in RESULTS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("width", [0, 8, 40], ids=lambda width: f"width {width}")
def test_the_same_input_gives_the_same_bytes(width: int, version: str, device: torch.device) -> None:
    b = block(40, 17, width=width).to(torch.float32, device)
    one, other = run(version, b), run(version, b)
    assert all(same_bytes(one[name], other[name]) for name in RESULTS)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("k", "width"), [(16, 16), (64, 64), (64, 32), (40, 40)])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_range_of_a_group_of_one_sign_reaches_to_zero(
    version: str, k: int, width: int, sign: int, symmetric: bool, device: torch.device
) -> None:
    """Also if there is only one group."""
    b = block(k, 5, GridSpec(bits=4, symmetric=symmetric), width=width).to(torch.float32, device)
    b = replace(b, target=sign * (2 + b.target.sin()), u=torch.eye(k, device=device))
    reach = b.target.abs().view(-1, width, 5).amax(1).double()
    result = run(version, b)
    assert torch.allclose(result["scale"].double(), reach * (2 if symmetric else 1) / 15, rtol=2**-10, atol=0)
    assert bool((result["zero"] == (8 if symmetric else 15 if sign < 0 else 0)).all())


@pytest.mark.parametrize(("width", "expected"), [(0, {0}), (32, {3})], ids=["given", "found"])
def test_given_scales_of_any_precision_use_one_variant(width: int, expected: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded already; each constant of the kernel is compiled separately."""
    module = pytest.importorskip("bigq.kernels.gpu.gptq_block")
    dropped: set[int] = set()

    class Recorder:
        def __getitem__(self, _grid: object) -> Callable[..., None]:
            return lambda *_arguments, **named: dropped.add(named["DROP"])

    monkeypatch.setattr(module, "_gptq_block_kernel", Recorder())
    run("triton", block(64, 5, replace(SYMMETRIC, scale_bits=8), width=width).to(torch.float32, torch.device("cpu")))
    assert dropped == expected


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("width", [0, 8], ids=["given", "found"])
def test_the_public_function_uses_triton_for_fp32_and_the_reference_for_fp64(width: int, device: torch.device) -> None:
    b = block(24, 7, width=width).to(torch.float32, device)
    one, other = run("public", b), run("triton", b)
    assert all(same_bytes(one[name], other[name]) for name in RESULTS)
    double = b.to(torch.float64, device)
    one, other = run("public", double), run("reference", double)
    assert all(same_bytes(one[name], other[name]) and one["loss"].dtype == torch.float64 for name in RESULTS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lower_triangle_of_u_is_not_used(version: str, device: torch.device) -> None:
    for width in (0, 8):
        b = block(40, 4, width=width).to(torch.float32, device)
        below = torch.ones(40, 40, dtype=torch.bool, device=device).tril(-1)
        one, other = run(version, b), run(version, replace(b, u=b.u.masked_fill(below, 9.0)))
        assert all(same_bytes(one[name], other[name]) for name in RESULTS)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_weight_has_an_effect(version: str, device: torch.device) -> None:
    """The last row's first weight changes all of its columns that U reaches, and no other row."""
    b = block(24, 17).to(torch.float32, device)
    moved = b.target.clone()
    moved[0, 16] += 0.3 * b.scale[b.group[0], 16]
    one, other = run(version, b), run(version, replace(b, target=moved))
    changed = one["target"] != other["target"]
    assert not changed[:, :16].any() and int(changed[:, 16].sum()) == 24
    b.u[3, 20] += 0.5
    assert int((run(version, b)["target"] != one["target"]).any(1).sum()) >= 1


@pytest.mark.parametrize("version", VERSIONS)
def test_work_that_is_not_the_target_has_its_own_error(version: str, device: torch.device) -> None:
    """``work`` minus the value of the code, whatever the correction was."""
    b = block(16, 5, width=8).to(torch.float32, device)
    result = run(version, b)
    points = (result["codes"].double() - result["zero"].double()[b.group]) * result["scale"].double()[b.group]
    assert torch.allclose(result["work"].double(), b.work.double() - points, rtol=0, atol=1e-5)
    other = run(version, replace(b, work=b.work + 1))
    assert all(same_bytes(result[name], other[name]) for name in RESULTS if name != "work")
    assert torch.allclose(other["work"] - result["work"], torch.ones_like(b.work), rtol=0, atol=1e-5)


def tiny(target: list[list[float]], u: list[list[float]], spec: GridSpec = SYMMETRIC) -> Block:
    """One group with scale 1 and zero point ``2**(bits-1)``."""
    w = torch.tensor(target)
    ones = torch.ones(1, w.shape[1])
    group = torch.zeros(len(w), dtype=torch.int64)
    half = 2.0 ** (spec.bits - 1)
    return Block(target=w, u=torch.tensor(u), work=w.clone(), spec=spec, scale=ones, zero=half * ones, group=group, find=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_halves_are_rounded_to_even(version: str, device: torch.device) -> None:
    b = tiny([[0.5, 1.5, 2.5, -0.5, -1.5]], [[1.0]]).to(torch.float32, device)
    result = run(version, b)
    assert result["codes"].tolist() == [[8, 10, 10, 8, 6]]
    assert result["target"].tolist() == result["work"].tolist() == [[0.5, -0.5, 0.5, -0.5, 0.5]]
    assert result["loss"].tolist() == [0.25] * 5


@pytest.mark.parametrize("version", VERSIONS)
def test_codes_end_where_the_bits_end(version: str, device: torch.device) -> None:
    for bits, top in ((2, 3), (3, 7), (4, 15), (8, 255)):
        spec = GridSpec(bits=bits, symmetric=True)
        result = run(version, tiny([[1e9, -1e9, 1e6, -300.0]], [[2.0]], spec).to(torch.float32, device))
        assert result["codes"].tolist() == [[top, 0, top, 0]]
        assert result["work"][0, 3].item() == -300.0 + (top + 1) // 2 and result["target"][0, 3].item() == result["work"][0, 3].item() / 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_single_error_is_spread_along_its_row_of_u(version: str, device: torch.device) -> None:
    """Column 0 rounds 0.4 to 0: its error 0.4 / 2 leaves column 1 at 0.9 − 0.2 · 3 = 0.3, which rounds to 0."""
    result = run(version, tiny([[0.4], [0.9]], [[2.0, 3.0], [0.0, 1.0]]).to(torch.float32, device))
    assert result["codes"].tolist() == [[8], [8]]
    assert result["target"].flatten().tolist() == pytest.approx([0.2, 0.3])
    assert result["work"].flatten().tolist() == pytest.approx([0.4, 0.9])
    assert result["loss"].tolist() == pytest.approx([0.2**2 + 0.3**2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("version", VERSIONS)
def test_scales_at_the_ends_of_fp16(version: str, symmetric: bool, device: torch.device) -> None:
    """In separate rows: a group of zeros has scale 1, a too small one the smallest fp16 number, a too large one Inf."""
    b = block(16, 5, GridSpec(bits=4, symmetric=symmetric), width=16)
    b.target[:, 0], b.target[:, 1] = 0, 1e-9 * b.target[:, 1].sign()
    b.target[:, 2] = 1e-6 * b.target[:, 1].sign()
    b.target[7, 4] = 1e8
    result = run(version, b.to(torch.float32, device))
    scale = result["scale"][0].tolist()
    assert scale[:2] == [1, TINY] and scale[4] == float("inf")
    assert scale[2] > TINY and scale[2] == pytest.approx(2e-6 / 15, rel=0.5) and result["zero"][0, 0].item() == (8 if symmetric else 0)
    assert result["loss"][:4].isfinite().all() and not result["loss"][4].isfinite()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("find", [False, True], ids=["given", "found"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_nonfinite_weight_shows_in_its_rows_loss(version: str, bad: float, find: bool, device: torch.device) -> None:
    b = block(16, 5, width=8 * find).to(torch.float32, device)
    b.target[11, 2] = bad
    assert run(version, b)["loss"].isfinite().tolist() == [True, True, False, True, True]


def test_triton_supports_at_most_128_columns(device: torch.device) -> None:
    with pytest.raises(AssertionError):
        run("triton", block(136, 2).to(torch.float32, device))

"""The compiled kernels: codecs over whole domains, passes against the definitions bit for bit, exact tallies."""

from __future__ import annotations

import itertools
import math
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from definitions import MERGE_METHODS, MERGES, SPARSIFIERS, applied, merge_tensor, options
from driving import FLOATS, GRAIN, bfloat16, drive, load, store, work_on

from modelfuse.dtypes import BF16, F16, F32, F64
from modelfuse.kernels import measures
from modelfuse.kernels.compiled import direct_reads, merge_loops, passes, tally_passes
from modelfuse.kernels.order_statistics import FLOAT_ENCODINGS, Tally
from modelfuse.kernels.sorted_magnitudes import MOST
from modelfuse.methods.applied import Applied
from modelfuse.methods.random import draws, stream_key
from modelfuse.methods.slerp import coefficients
from modelfuse.methods.trim import kept_from
from modelfuse.planning.memory_budget import GRAIN as PLAN_GRAIN
from modelfuse.planning.memory_budget import SPAN

Array = npt.NDArray[Any]
ALL_HALVES = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
RANDOM = np.random.default_rng(20240607)
SPARSIFY_TYPES = (None, *SPARSIFIERS)


# Codecs ---------------------------------------------------------------------------------------------------------------


def decode(code: int, stored: Array, compute: str) -> tuple[Array, int]:
    out = np.empty(stored.size, compute)
    return out, merge_loops.decode(code, stored.view(np.uint8), 0, stored.size, out)


def encode(code: int, values: Array) -> tuple[Array, int]:
    stored: dict[int, type] = {merge_loops.RAW_BF16: np.uint16, merge_loops.RAW_F16: np.float16,
                               merge_loops.RAW_F32: np.float32, merge_loops.RAW_F64: np.float64}  # fmt: skip
    room: Array = np.zeros(values.size, stored[code])
    return room, merge_loops.encode(code, values, values.size, room.view(np.uint8), 0)


def same_values(ours: Array, theirs: Array) -> None:
    """Bit for bit, but any NaN is as good as another."""
    bits = f"u{ours.itemsize}"
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(bits), theirs[~nan].view(bits))


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_every_bfloat16_is_decoded_as_the_high_half_of_a_float32(compute: str) -> None:
    ours, bad = decode(merge_loops.RAW_BF16, ALL_HALVES, compute)
    same_values(ours, load(ALL_HALVES, BF16, compute))
    assert bad == 2 * 128  # Both signs of all patterns with the highest exponent.


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_every_float16_is_decoded_as_numpy_does(compute: str) -> None:
    ours, bad = decode(merge_loops.RAW_F16, ALL_HALVES, compute)
    same_values(ours, ALL_HALVES.view(np.float16).astype(compute))
    assert bad == 2 * 1024


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize(("code", "stored"), [(merge_loops.RAW_BF16, "bfloat16"), (merge_loops.RAW_F16, "float16")])
def test_every_half_survives_a_round_trip(code: int, stored: str, compute: str) -> None:
    values, _ = decode(code, ALL_HALVES, compute)
    back, bad = encode(code, values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(back.view(np.uint16)[~nan], ALL_HALVES[~nan])
    assert np.isnan(load(back, FLOATS[stored], "float32")[nan]).all()
    assert bad == (2 * 128 if code == merge_loops.RAW_BF16 else 2 * 1024)


def interesting_singles() -> Array:
    """Random patterns, everything next to what halves can hold and the points half-way between, and specials."""
    exact = [(ALL_HALVES.astype(np.uint32) << np.uint32(16)), ALL_HALVES.view(np.float16).astype(np.float32).view("u4")]
    middles = []
    for bits in exact:
        for middle in (0x8000, 0x1000, 0):
            centre = bits + np.uint32(middle)
            middles += [centre - np.uint32(1), centre, centre + np.uint32(1)]
    # Half-way between two float16 subnormals, and beside it.
    small = ((np.arange(2048) + 0.5) * 2.0**-24).astype(np.float32).view(np.uint32)
    middles += [small - np.uint32(1), small, small + np.uint32(1)]
    random = RANDOM.integers(0, 1 << 32, 500_000, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([*middles, random]).view(np.float32)


SINGLES = interesting_singles()


def test_float32_is_rounded_to_float16_as_numpy_does() -> None:
    with np.errstate(over="ignore", under="ignore"):
        theirs = SINGLES.astype(np.float16)
    ours, bad = encode(merge_loops.RAW_F16, SINGLES)
    same_values(ours, theirs)
    assert bad == np.count_nonzero(~np.isfinite(theirs))


def test_float32_is_rounded_to_bfloat16_to_nearest_even() -> None:
    theirs = bfloat16(SINGLES)
    ours, bad = encode(merge_loops.RAW_BF16, SINGLES)
    same_values(load(ours, BF16, "float32"), load(theirs, BF16, "float32"))
    assert bad == np.count_nonzero((theirs & 0x7F80) == 0x7F80)


def test_bfloat16_rounding_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(SINGLES.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    ours, _ = encode(merge_loops.RAW_BF16, SINGLES)
    same_values(load(ours, BF16, "float32"), load(theirs, BF16, "float32"))
    same_values(load(bfloat16(SINGLES), BF16, "float32"), load(theirs, BF16, "float32"))


def nearest_half(value: float, mantissa: int, least: int, greatest: int) -> float:
    """Exact rounding of a finite value to nearest even: ``mantissa`` stored bits, and a range of exponents."""
    exact = Fraction(value)
    if not exact:
        return value
    exponent = max(math.frexp(value)[1] - 1, least)
    unit = Fraction(2) ** (exponent - mantissa)
    rounded = round(exact / unit) * unit  # Python rounds halves to even.
    if abs(rounded) >= Fraction(2) ** (greatest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def double_rounding_traps() -> Array:
    """Values a hair's breadth beside the middle of two halves: rounding to float32 first lands on the middle."""
    traps = []
    for mantissa, exponents in ((7, (-133, -130, -126, -1, 0, 5, 127)), (10, (-24, -20, -15, -14, 0, 15))):
        significands = (0, 1, 2, 3, 1 << (mantissa - 1), (1 << mantissa) - 1)
        for exponent, significand in itertools.product(exponents, significands):
            least = -126 if mantissa == 7 else -14
            unit = 2.0 ** (max(exponent, least) - mantissa)
            middle = (2.0**exponent if exponent >= least else 0.0) + significand * unit + unit / 2
            hair = abs(middle) * 2.0**-45
            traps += [middle - hair, middle, middle + hair, np.nextafter(middle, 0), np.nextafter(middle, np.inf)]
    traps += [2.0**-25, np.nextafter(2.0**-25, 1), 2.0**-134, np.nextafter(2.0**-134, 1), 65519.99999999999, 65520.0,
              3.3895313892515355e38, 3.3961775292304601e38, 5e-324, 1e308, 0.0, -0.0]  # fmt: skip
    return np.array(traps + [-trap for trap in traps])


@pytest.mark.parametrize(
    ("code", "dtype", "shape"),
    [(merge_loops.RAW_BF16, BF16, (7, -126, 127)), (merge_loops.RAW_F16, F16, (10, -14, 15))],
    ids=["bfloat16", "float16"],
)
def test_float64_is_rounded_once(code: int, dtype: Any, shape: tuple[int, int, int]) -> None:
    random = np.ldexp(RANDOM.uniform(-2, 2, 3000), RANDOM.integers(-140, 130, 3000))
    values = np.concatenate([double_rounding_traps(), random])
    ours, bad = encode(code, values)
    expected = np.array([nearest_half(float(value), *shape) for value in values])
    same_values(load(ours, dtype, "float64"), expected)
    assert bad == np.count_nonzero(~np.isfinite(expected))


def test_float64_is_rounded_to_float32_once() -> None:
    beside_the_middle = [1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50]
    values = np.concatenate([double_rounding_traps(), RANDOM.uniform(-1, 1, 1000), beside_the_middle])
    expected = np.array([nearest_half(float(value), 23, -126, 127) for value in values])
    ours, bad = encode(merge_loops.RAW_F32, values)
    same_values(ours.astype(np.float64), expected)
    assert bad == np.count_nonzero(~np.isfinite(expected))


@pytest.mark.parametrize("code", [merge_loops.RAW_F32, merge_loops.RAW_F64])
def test_float32_and_float64_pass_unchanged(code: int) -> None:
    compute: type[Any] = {merge_loops.RAW_F32: np.float32, merge_loops.RAW_F64: np.float64}[code]
    values = np.array([0.0, -0.0, 5e-324, 1e-45, 1.5, -np.inf, np.inf, np.nan, np.finfo(compute).max]).astype(compute)
    ours, bad = decode(code, values, compute.__name__)
    same_values(ours, values)
    back, bad_again = encode(code, values)
    same_values(back, values)
    assert bad == bad_again == 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_elements_are_counted_for_every_source_and_the_output(dtype: str) -> None:
    """Model 1 holds three, model 2 none and overflows with model 3, the base one."""
    kind = FLOATS[dtype]
    size = 5000
    models = [np.ones(size), np.full(size, 2.0), np.full(size, 3.0), np.ones(size)]
    models[0][[0, 1023, 4999]] = np.nan, np.inf, -np.inf
    models[3][1024] = np.nan
    stored = [store(model, kind) for model in models]
    method = applied("linear", None, (1.0, 1.0, 1.0))
    _, bad = drive(work_on(stored, [kind] * 4, method, True, kind), stored)
    assert bad.tolist() == [3, 0, 0, 1, 4]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_overflow_is_counted_for_the_output_alone(dtype: str) -> None:
    kind = FLOATS[dtype]
    largest = {"float32": 3e38, "float64": 1e308, "float16": 60000.0, "bfloat16": 3e38}[dtype]
    stored = [store(np.array([largest, 1.0, -largest]), kind)] * 2
    _, bad = drive(work_on(stored, [kind] * 2, applied("linear", None, (1.0, 1.0)), False, kind), stored)
    assert bad.tolist() == [0, 0, 2]


# Passes against the definitions ---------------------------------------------------------------------------------------


SOURCES = {
    "float32": (F32, F32, F32),
    "float16": (F16, F16, F16),
    "bfloat16": (BF16, BF16, BF16),
    "float64": (F64, F64, F64),
    "mixed 16": (BF16, F16, BF16),
    "mixed 32": (F16, F32, BF16),
    "mixed 64": (BF16, F64, F32),
}
SIZES = (1, 2, 1000, 4097, 300_000)


def some_models(size: int, sources: tuple[Any, ...], seed: int) -> list[Array]:
    """Stored models: near each other like fine-tunes, with zeros of both signs, equal values and subnormals."""
    random = np.random.default_rng(seed)
    origin = random.normal(0, 0.02, size)
    stored = []
    for number, source in enumerate(sources):
        values = origin + random.normal(0, 0.002, size) * (number + 1)
        kinds = random.integers(0, 20, size)
        values[kinds == 0] = 0.0
        values[kinds == 1] = -0.0
        values[kinds == 2] = 0.0078125
        values[kinds == 3] *= 1e-6
        values[kinds == 4] = origin[kinds == 4]
        stored.append(store(values, source))
    return stored


def a_method(merge_type: str, sparsify_type: str | None, models: int, **settings: Any) -> Applied:
    weights = (0.5, -0.25, 1.25)[:models] if merge_type != "slerp" else (1.0,) * models
    return applied(merge_type, sparsify_type, weights, **settings)


def expected_bytes(work: Any, stored: list[Array], found: list[tuple[Any, Any]]) -> Array:
    """The definition's result, stored.

    Only two things are taken from the kernels, and checked elsewhere: the rounding of slerp's sums, and
    magprune's probabilities where magnitudes share a bin.
    """
    values = [load(each, source, work.compute) for each, source in zip(stored, work.sources, strict=True)]
    base = values.pop() if work.has_base else None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if work.method.merge_type == "slerp":
            sums = next(result for pass_, result in found if isinstance(pass_, passes.DotProducts))
            merged = slerp_with(values, base, np.concatenate(sums), work.method, work.name)
        else:
            merged = merge_tensor(values, base, work.method, work.name)
    return store(merged, work.out)


def slerp_with(values: list[Array], base: Array | None, sums: Array, method: Applied, name: str) -> Array:
    """Slerp as defined, but with these sums, after checking that they are the exact ones.

    Where the tensors are float32, they are so up to float64's rounding.
    """
    xs = values if base is None else [x - base for x in values]
    prepared = [sparsified(x, model, method, name) for model, x in enumerate(xs)]
    wide = [x.astype(np.float64) for x in prepared]
    pairs = [(wide[0], wide[0]), (wide[1], wide[1]), (wide[0], wide[1])]
    totals = [math.fsum(sums[:, [product, product + 3]].ravel().tolist()) for product in range(3)]
    for total, (a, b) in zip(totals, pairs, strict=True):
        products = a * b
        off = 1e-14 if prepared[0].dtype == np.float32 else 0.0
        assert total == pytest.approx(math.fsum(products.tolist()), rel=off, abs=off * np.abs(products).sum())
    c1, c2 = coefficients(
        totals[0],
        totals[1],
        totals[2],
        method.shared.slerp_alpha,
        method.shared.slerp_normalize_eps,
        method.shared.slerp_dot_threshold,
    )
    compute = prepared[0].dtype.type
    merged: Array = prepared[0] * compute(c1) + prepared[1] * compute(c2)
    return merged if base is None else merged + base


def sparsified(x: Array, model: int, method: Applied, name: str) -> Array:
    """One model's tensor after the definition's sparsifier."""
    if method.sparsify_type is None:
        return x
    function = SPARSIFIERS[method.sparsify_type]
    drawn = [draws(stream_key(method.seed, model, name), 0, x.size)] if method.sparsify_type != "trim" else []
    return function(x, *drawn, **options(method, function, model))


def assert_same_bytes(ours: Array, theirs: Array) -> None:
    different = np.flatnonzero(ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}"))
    few = different[:5]
    assert different.size == 0, f"{different.size} differ, first {few}: {ours[few]} and {theirs[few]}"


def with_exact_ranks(values: Array, sparsify_type: str | None) -> Array:
    """For magprune few mantissa bits, so that differences have one magnitude a bin, of float64 too."""
    if sparsify_type == "magprune":
        values = np.clip(np.round(values * 8) / 8, -1.875, 1.875)
    rounded: Array = (np.round(values * 2**9) / 2**9).astype(np.float32)
    return rounded


@pytest.mark.parametrize("has_base", [False, True], ids=["weights", "deltas"])
@pytest.mark.parametrize("sources", SOURCES, ids=str)
@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
@pytest.mark.parametrize("merge_type", MERGES)
def test_kernels_equal_the_definitions_bit_for_bit(
    merge_type: str, sparsify_type: str | None, sources: str, has_base: bool
) -> None:
    for number, size in enumerate(SIZES if has_base else (*SIZES[:-1], GRAIN * 5 + 77)):
        models = 2 if merge_type == "slerp" else 3
        kinds = (*SOURCES[sources][:models], SOURCES[sources][0]) if has_base else SOURCES[sources][:models]
        seed = zlib.crc32(f"{merge_type} {sparsify_type} {sources} {has_base} {size}".encode())
        stored = some_models(size, kinds, seed)
        if sparsify_type == "magprune":
            values = [load(each, kind, "float64") for each, kind in zip(stored, kinds, strict=True)]
            stored = [
                store(with_exact_ranks(each, sparsify_type), kind) for each, kind in zip(values, kinds, strict=True)
            ]
        settings: dict[str, Any] = {
            "rescale": number % 2 == 0,
            "normalize": number % 3 == 0,
            "ties_elect_type": ("sum", "count")[number % 2],
            "reserve_p": (0.7, 0.3, 0.5)[number % 3],
            "epsilon": 0.2,
            "slerp_alpha": 0.3,
            "seed": seed,
        }
        out = kinds[number % len(kinds)]
        work = work_on(stored, kinds, a_method(merge_type, sparsify_type, models, **settings), has_base, out)
        found: list[tuple[Any, Any]] = []
        spans = [GRAIN * 3, GRAIN * 4] if size > GRAIN * 4 else []
        ours, bad = drive(work, stored, spans, passes=found)
        assert_same_bytes(ours, expected_bytes(work, stored, found))
        assert not bad.any()


def test_every_merge_method_is_a_combination_tested_above() -> None:
    assert all(sparse in SPARSIFY_TYPES and merge in MERGES for sparse, merge in MERGE_METHODS.values())


@pytest.mark.parametrize("merge_type", ["linear", "ties"])
@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
def test_a_single_nonfinite_element_stays_alone(merge_type: str, sparsify_type: str | None) -> None:
    """With ``on_nonfinite propagate`` the elements beside it, and those dropped, are what they would be without."""
    size = 3000
    values = [with_exact_ranks(np.random.default_rng(model).normal(size=size), sparsify_type) for model in range(2)]
    places = [0, 1024, 2999]
    for value in (np.inf, -np.inf, np.nan):
        values[0][places] = value
        method = a_method(merge_type, sparsify_type, 2, reserve_p=0.5)
        work = work_on(values, [F32, F32], method, False, F32)
        ours, bad = drive(work, values)
        assert bad[0] == 3
        others = np.setdiff1d(np.arange(size), places)
        assert np.isfinite(ours[others]).all()
        with np.errstate(invalid="ignore"):
            same_values(ours, merge_tensor(values, None, method, "w"))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_slerp_of_nonfinite_elements_is_nan_and_no_crash(value: float) -> None:
    values = [np.ones(100_000, np.float32), np.ones(100_000, np.float32)]
    values[0][[5, 99_999]] = value, -value
    ours, bad = drive(work_on(values, [F32, F32], applied("slerp", None, (1.0, 1.0)), False, F32), values)
    assert np.isnan(ours).all()
    assert bad[0] == 2


def test_slerp_sums_beyond_float64_are_no_crash() -> None:
    values = [np.full(100_000, 1e153) for _ in range(2)]
    ours, bad = drive(work_on(values, [F64, F64], applied("slerp", None, (1.0, 1.0)), False, F64), values)
    assert ours.size == 100_000
    assert bad[:2].tolist() == [0, 0]


# Magnitudes -----------------------------------------------------------------------------------------------------------


def distributions(size: int, dtype: str) -> dict[str, Array]:
    """Magnitudes that strain tallies."""
    random = np.random.default_rng(size)
    step = float(np.finfo(dtype).eps)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    one = np.zeros(size)
    one[size // 3] = -3e-5
    alternating = np.where(np.arange(size) % 2, 1.0, -1.0)
    return {
        "normal": random.normal(size=size),
        "all equal": 0.3 * alternating,
        "two clumps closer than 2**-12": alternating * (1 + 2.0**-14 * (random.random(size) < 0.4)),
        "half at a bin's edge, half just above": np.where(random.random(size) < 0.5, 1.0, 1 + step),
        "all within 1%": random.uniform(1, 1.01, size) * alternating,
        "all within 10 steps": 1 + step * random.integers(0, 11, size),
        "all within 2**-30": 1 + random.uniform(0, 2.0**-30, size),
        "heavy ties": random.choice([0.0, -0.0, 0.25, -0.25, 0.1, 7.0], size),
        "all zeros except one": one,
        "zeros, then others": np.where(np.arange(size) < size * 0.6, 0.0, random.normal(size=size)),
        "subnormals": tiny * random.integers(0, 50_000, size),
        "one subnormal unit": np.where(random.random(size) < 0.5, tiny, 0.0),
        "huge range": random.choice([-1, 1], size) * np.exp2(random.uniform(-140, 120, size)),
        "powers of two": np.exp2(random.integers(-20, 20, size)),
        "few large": np.where(random.random(size) < 0.001, 1e30, 1e-30),
    }  # fmt: skip


NAMES = tuple(distributions(2, "float32"))


def kept_probability(x: Array, dtype: Any, has_base: bool, **settings: Any) -> Array:
    """The kernels' probability of keeping each element, read off what they divided by; NaN where it was dropped."""
    seeds, probability = 2, np.full(x.size, np.nan)
    for seed in range(seeds):
        method = applied("linear", "magprune", (1.0, 0.0), seed=seed, **settings)
        zeros = np.zeros_like(x)
        base = [np.full_like(x, 0.0)] if has_base else []
        stored = [x, zeros, *base]
        ours, _ = drive(work_on(stored, [dtype] * len(stored), method, has_base, dtype), stored, [GRAIN])
        kept = ours != 0
        with np.errstate(under="ignore"):
            probability[kept] = x[kept].astype(np.float64) / ours[kept].astype(np.float64)
    return probability


def exact_probability(x: Array, reserve_p: float, epsilon: float) -> tuple[Array, Array]:
    """The range of probabilities that the ranks of an element's group of equal magnitudes allow."""
    magnitudes = np.abs(x)
    order = np.sort(magnitudes)
    first = x.size - np.searchsorted(order, magnitudes, side="right")
    last = x.size - 1 - np.searchsorted(order, magnitudes, side="left")
    low, high = (reserve_p + epsilon / 2 - epsilon * ranks / x.size for ranks in (last, first))
    return low, high


@pytest.mark.parametrize(("reserve_p", "epsilon"), [(0.7, 0.14), (0.5, 0.9)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_probability_of_magprune_is_off_by_more_than_1e_4(
    dtype: str, name: str, reserve_p: float, epsilon: float
) -> None:
    size = 2 * GRAIN
    x = distributions(size, dtype)[name].astype(dtype)
    ours = kept_probability(x, FLOATS[dtype], False, reserve_p=reserve_p, epsilon=epsilon)
    if not np.count_nonzero(x):
        assert np.isnan(ours).all()
        return
    low, high = exact_probability(x, reserve_p, epsilon)
    # Reading the probability off costs a rounding of the quotient; of subnormals it cannot be read off at all.
    readable = ~np.isnan(ours) & (np.abs(x) > np.finfo(dtype).tiny * 100)
    ours, low, high = ours[readable], low[readable], high[readable]
    slack = 1e-4 + 4 * float(np.finfo(dtype).eps)
    assert (ours >= low - slack).all(), (low - ours).max()
    assert (ours <= high + slack).all(), (ours - high).max()
    if name not in ("subnormals", "one subnormal unit", "all zeros except one"):
        assert readable.sum() > 0.35 * size


@pytest.mark.parametrize("name", ["subnormals", "one subnormal unit", "all zeros except one"])
def test_subnormals_are_dropped_by_their_ranks(name: str) -> None:
    """Without rescaling, what is kept must be what the exact ranks keep, but for draws within 1e-4 of them."""
    x = distributions(2 * GRAIN, "float32")[name].astype(np.float32)
    method = applied("linear", "magprune", (1.0, 0.0), rescale=False, reserve_p=0.6, epsilon=0.5)
    ours, _ = drive(work_on([x, x], [F32, F32], method, False, F32), [x, x])
    drawn = draws(stream_key(0, 0, "w"), 0, x.size)
    low, high = exact_probability(x, 0.6, 0.5)
    solid = x != 0
    assert (ours[solid & (drawn < low - 1e-4)] != 0).all()
    assert (ours[solid & (drawn > high + 1e-4)] == 0).all()


def test_magprune_takes_little_memory_however_steep_the_probabilities() -> None:
    """Thousands of bins are too full for their width when epsilon is large."""
    x = np.random.default_rng(5).normal(size=4 * GRAIN).astype(np.float32)
    method = applied("linear", "magprune", (1.0, 1.0), reserve_p=0.5, epsilon=0.98)
    found: list[tuple[Any, Any]] = []
    drive(work_on([x, x], [F32, F32], method, False, F32), [x, x], passes=found)
    tallies = [span.nbytes for pass_, spans in found if isinstance(pass_, tally_passes.TallyWithin) for span in spans]
    assert tallies
    assert max(tallies) < 40_000_000


@pytest.mark.parametrize("reserve_p", [0.7, 0.31, 0.001, 1.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trim_is_exact(dtype: str, name: str, reserve_p: float) -> None:
    """The threshold against a plain sort, the factor against math.fsum; another model makes other bins narrow."""
    size = GRAIN + 1001
    x = distributions(size, dtype)[name].astype(dtype)
    other = np.random.default_rng(1).normal(size=size).astype(dtype) * 1e3
    magnitudes = np.abs(x)
    threshold = np.sort(magnitudes)[kept_from(size, reserve_p)]
    kept = magnitudes >= threshold
    before, after = math.fsum(magnitudes.tolist()), math.fsum(magnitudes[kept].tolist())
    factor = before / after if min(before, after) >= 1e-8 else 1.0
    expected = np.where(kept, x, 0) * x.dtype.type(factor)
    method = applied("linear", "trim", (1.0, 0.0), reserve_p=reserve_p)
    ours, _ = drive(work_on([x, other], [FLOATS[dtype]] * 2, method, False, FLOATS[dtype]), [x, other], [GRAIN])
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("sparsify_type", ["trim", "magprune"])
@pytest.mark.parametrize("models", range(1, 9))
def test_any_number_of_models_is_tallied(models: int, sparsify_type: str, dtype: str) -> None:
    """Each has its own scale, so that nobody's tally can stand in for another one's."""
    size, kind = 3 * direct_reads.BLOCK + 77, FLOATS[dtype]
    random = np.random.default_rng(models)
    values = [random.integers(-12, 13, size) * 2.0 ** (-2 * model) for model in range(models)]
    stored = [store(each, kind) for each in (*values, np.zeros(size))]
    method = applied("ties", sparsify_type, tuple(0.5 + model for model in range(models)), reserve_p=0.6, seed=3)
    work = work_on(stored, [kind] * (models + 1), method, True, kind)
    ours, _ = drive(work, stored)
    assert_same_bytes(ours, expected_bytes(work, stored, []))


@pytest.mark.parametrize("sparsify_type", ["trim", "magprune"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_or_span_of_zeros_alone(dtype: str, sparsify_type: str) -> None:
    """As where a tensor was not fine-tuned: all its differences are zero, or those of a whole span."""
    kind = FLOATS[dtype]
    zeros = np.zeros(3 * GRAIN, dtype)
    half = zeros.copy()
    half[2 * GRAIN :] = np.exp2(np.arange(GRAIN) % 7)
    for stored in ([zeros, half], [half, zeros], [zeros, -zeros]):
        method = applied("ties", sparsify_type, (1.0, 1.0), reserve_p=0.5)
        ours, _ = drive(work_on(stored, [kind, kind], method, False, kind), stored, [GRAIN, 2 * GRAIN])
        assert_same_bytes(ours, merge_tensor(stored, None, method, "w"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_thresholds_far_apart_in_float64_take_little_memory(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MOST", 0)  # However small, it is counted.
    random = np.random.default_rng(2)
    stored = [(random.normal(size=5000) * scale).astype(dtype) for scale in (1e-30, 1.0, 1e30)]
    method = applied("ties", "trim", (1.0, 1.0, 1.0))
    work = work_on(stored, [FLOATS[dtype]] * 3, method, False, FLOATS[dtype])
    ours, _ = drive(work, stored)
    assert_same_bytes(ours, merge_tensor(stored, None, method, "w"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tally_adds_up_exactly(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MOST", 0)
    layout = FLOAT_ENCODINGS[dtype]
    x = np.abs(distributions(4001, dtype)[name].astype(dtype))
    work = work_on([x, x], [FLOATS[dtype]] * 2, applied("linear", "trim", (1.0, 1.0)), False, FLOATS[dtype])
    found: list[tuple[Any, Any]] = []
    drive(work, [x, x], passes=found)
    (numbers, table), _ = next(result for pass_, result in found if isinstance(pass_, tally_passes.TallyAll))[0]
    tally = Tally(layout, layout.shift, numbers, table, sticky=True)
    assert int(tally.counts.sum()) == x.size
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    exact = sum((Fraction(float(value)) for value in x), Fraction(0))
    units = tally.units(0)
    assert units is not None
    assert Fraction(units, 1 << layout.least) == exact
    assert layout.amount(units) == math.fsum(x.tolist())
    order = np.sort(x)
    for start in (1, numbers.size // 2, numbers.size):
        above = order[int(tally.counts[:start].sum()) :]
        exact = sum((Fraction(float(value)) for value in above), Fraction(0))
        part = tally.units(start)
        assert part is not None
        assert Fraction(part, 1 << layout.least) == exact


def test_sums_that_are_not_finite_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MOST", 0)
    x = np.array([1.0, np.inf, 2.0], np.float32)
    found: list[tuple[Any, Any]] = []
    drive(work_on([x, x], [F32, F32], applied("linear", "trim", (1.0, 1.0)), False, F32), [x, x], passes=found)
    (numbers, table), _ = found[0][1][0]
    assert (
        Tally(FLOAT_ENCODINGS["float32"], FLOAT_ENCODINGS["float32"].shift, numbers, table, sticky=True).units(0)
        is None
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sparsify_type", ["trim", "magprune", "breadcrumbs"])
def test_small_tensors_are_sorted_to_the_bits_that_counting_gives(
    sparsify_type: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the size at which ranks are shared, and beyond; with zeros, ties and infinities."""
    sizes = (1, 2, 1000, 1400, 5000, MOST)
    for number, name in enumerate(NAMES):
        x = distributions(sizes[number % len(sizes)], dtype)[name].astype(dtype)
        other = np.zeros_like(x) if number % 3 == 0 else x[::-1].copy()
        if number % 4 == 1:
            other[-1] = np.inf
        method = applied("linear", sparsify_type, (1.0, 0.5), reserve_p=0.55, epsilon=0.14, rescale=number % 2 == 0)
        work = work_on([x, other], [FLOATS[dtype]] * 2, method, False, FLOATS[dtype])
        with np.errstate(all="ignore"):
            monkeypatch.setattr(measures, "MOST", MOST)
            ours, _ = drive(work, [x, other])
            monkeypatch.setattr(measures, "MOST", 0)
            theirs, _ = drive(work, [x, other])
        same_values(ours, theirs)


def test_slices_start_where_sums_and_blocks_do() -> None:
    assert SPAN % PLAN_GRAIN == 0
    assert PLAN_GRAIN % merge_loops.CHUNK == 0
    assert merge_loops.CHUNK % direct_reads.BLOCK == 0


def test_a_procedure_writes_once_and_last() -> None:
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for merge_type, sparsify_type in itertools.product(MERGES, SPARSIFY_TYPES):
        found: list[tuple[Any, Any]] = []
        method = a_method(merge_type, sparsify_type, 2)
        drive(work_on([x, x], [F32, F32], method, False, F32), [x, x], passes=found)
        assert [pass_.writes for pass_, _ in found] == [False] * (len(found) - 1) + [True]

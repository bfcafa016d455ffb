"""The kernels over torch's and Paddle's tensors: the bits of the definitions and of the compiled kernels."""

from __future__ import annotations

import itertools
import math
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from definitions import MERGES, applied, merge_tensor
from driving import FLOATS, drive, load, store, walk, work_on
from hypothesis import given, settings
from msgspec.structs import replace
from simulated_gpu import SimulatedGpu
from simulated_paddle_gpu import SimulatedPaddleGpu
from test_kernels import (
    NAMES,
    SINGLES,
    SOURCES,
    SPARSIFY_TYPES,
    a_method,
    distributions,
    double_rounding_traps,
    some_models,
    with_exact_ranks,
)
from test_properties import SEVERAL_SPANS, Case, cases

from modelfuse.dtypes import BF16, F16, F32, DType
from modelfuse.execution.scheduler import Job, Scheduler
from modelfuse.kernels import Pass, Work, backends
from modelfuse.kernels.arrays.arithmetic import CHUNK, Arithmetic
from modelfuse.kernels.arrays.library import Library
from modelfuse.kernels.arrays.passes import DotProducts
from modelfuse.kernels.backends import LIBRARIES, Device, choose, find_gpu, import_library
from modelfuse.kernels.compiled import merge_loops
from modelfuse.kernels.compiled.scratch import RAW_CODES
from modelfuse.kernels.kernel import ArrayKernel
from modelfuse.methods.random import draws, stream_key
from modelfuse.planning.memory_budget import GRAIN as PLAN_GRAIN
from modelfuse.planning.memory_budget import LEAST_GPU_WORKER_BYTES

Array = npt.NDArray[Any]
#: Every library on the CPU and on a GPU; on a simulated one where there is none.
DEVICES = [(tensor_type, gpu) for gpu in (False, True) for tensor_type in LIBRARIES]


@pytest.fixture(params=DEVICES, ids=lambda each: f"{each[0]}-{'gpu' if each[1] else 'cpu'}")
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    tensor_type, gpu = request.param
    if gpu and not find_gpu(tensor_type, "gpu", allow_cpu_fallback=True):
        # The tests' own memory is not pinned.
        simulated = (SimulatedGpu(pinned=False) if tensor_type == "pt" else SimulatedPaddleGpu()).module()
        monkeypatch.setattr(backends, "import_module", lambda name: simulated)
    return Device(tensor_type, gpu)


@pytest.fixture
def kernel(device: Device) -> Iterator[ArrayKernel]:
    chosen = array_kernel(device)
    with chosen.running():
        yield chosen


def array_kernel(device: Device) -> ArrayKernel:
    chosen = choose(device)
    assert isinstance(chosen, ArrayKernel)
    return chosen


@pytest.fixture
def library(kernel: ArrayKernel) -> Iterator[Library]:
    with kernel.library.working():
        yield kernel.library


def merged(
    kernel: ArrayKernel, work: Work, stored: Sequence[Array], spans: Sequence[int] = (), step: int = 4 * CHUNK
) -> tuple[Array, Array]:
    return drive(work, stored, spans, step, procedure=kernel.merge(work))


def same_values(ours: Array, theirs: Array, name: str) -> None:
    """Bit for bit, but any NaN is as good as another."""
    bits = f"u{ours.itemsize}"
    wide = [each.astype(np.uint32) << np.uint32(16) if each.dtype == np.uint16 else each for each in (ours, theirs)]
    nan = [np.isnan(each.view(np.float32) if each.dtype == np.uint32 else each) for each in wide]
    np.testing.assert_array_equal(nan[0], nan[1])
    different = np.flatnonzero((ours.view(bits) != theirs.view(bits)) & ~nan[1])
    few = different[:5]
    assert different.size == 0, f"{name}: {different.size} differ, first {few}: {ours[few]} and {theirs[few]}"


# Against the definitions and the compiled kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("has_base", [False, True], ids=["weights", "deltas"])
@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
@pytest.mark.parametrize("merge_type", MERGES)
def test_all_are_the_definitions_and_the_compiled_kernels_bit_for_bit(
    kernel: ArrayKernel, merge_type: str, sparsify_type: str | None, has_base: bool
) -> None:
    """magprune ranks as the definition does where a bin holds one magnitude, else as the compiled kernels do."""
    models = 2 if merge_type == "slerp" else 3
    for number, sources in enumerate(SOURCES):
        size = (1, 1000, CHUNK + 77)[(number + models + has_base) % 3]
        kinds = (*SOURCES[sources][:models], SOURCES[sources][0]) if has_base else SOURCES[sources][:models]
        name = f"{merge_type} {sparsify_type} {sources} {has_base} {size}"
        seed = zlib.crc32(name.encode())
        stored = some_models(size, kinds, seed)
        method = a_method(
            merge_type, sparsify_type, models, rescale=seed % 2 == 0, normalize=seed % 3 == 0, epsilon=0.2, seed=seed,
            ties_elect_type=("sum", "count")[seed % 2], reserve_p=(0.7, 0.3, 0.5)[seed % 3], slerp_alpha=0.3,
        )  # fmt: skip
        work = work_on(stored, kinds, method, has_base, kinds[number % len(kinds)])
        spans = [CHUNK] if size > CHUNK else []
        ours, bad = merged(kernel, work, stored, spans)
        assert not bad.any()
        compiled, _ = drive(work, stored, spans, 4 * CHUNK)
        same_values(ours, compiled, name)
        if sparsify_type == "magprune":
            values = [load(each, kind, "float64") for each, kind in zip(stored, kinds, strict=True)]
            stored = [
                store(with_exact_ranks(each, sparsify_type), kind) for each, kind in zip(values, kinds, strict=True)
            ]
            ours, _ = merged(kernel, work, stored, spans)
        values = [load(each, kind, work.compute) for each, kind in zip(stored, kinds, strict=True)]
        base = values.pop() if has_base else None
        with np.errstate(over="ignore", under="ignore"):
            same_values(ours, store(merge_tensor(values, base, method, work.name), work.out), name)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_deltas_are_not_taken_from_the_base_again(kernel: ArrayKernel, method: str) -> None:
    """As adapters are: their values are differences already."""
    kinds = (F32, BF16, F16, BF16)
    stored = some_models(CHUNK + 5, kinds, 11)
    for sparsify_type in SPARSIFY_TYPES:
        work = work_on(stored, kinds, a_method(method, sparsify_type, 3, seed=5), True, BF16)
        work = replace(work, deltas=(True, False, True))
        ours, bad = merged(kernel, work, stored)
        theirs, bad_too = drive(work, stored)
        same_values(ours, theirs, f"{method} {sparsify_type}")
        assert bad.tolist() == bad_too.tolist()


@settings(max_examples=80)
@given(case=cases(sizes=SEVERAL_SPANS))
def test_any_case_is_as_the_compiled_kernels_merge_it(case: Case) -> None:
    """And as it is defined, where that says all: equal magnitudes may share a rank."""
    for tensor_type in LIBRARIES:
        kernel = array_kernel(Device(tensor_type))
        with kernel.running(), np.errstate(all="ignore"):
            ours, bad = merged(kernel, case.work, case.stored)
            theirs, bad_too = drive(case.work, case.stored)
            assert bad[:-1].tolist() == bad_too[:-1].tolist()
            if case.method.merge_type != "slerp":
                same_values(ours, theirs, tensor_type)
            if case.method.sparsify_type != "magprune":
                same_values(ours, store(case.defined(), case.out), tensor_type)


# Slices, blocks, workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_type", MERGES)
def test_neither_slices_nor_blocks_nor_workers_change_a_byte(device: Device, merge_type: str) -> None:
    """A tensor larger than a slice, a slice larger than a worker's memory on the device, and concurrent spans."""
    kinds = (BF16, BF16, BF16)
    size = 5 * CHUNK + 321
    stored = some_models(size, kinds, 3)
    for sparsify_type in SPARSIFY_TYPES:
        work = work_on(stored, kinds, a_method(merge_type, sparsify_type, 2, reserve_p=0.6, seed=1), True, F32)
        whole = array_kernel(device)
        with whole.running():
            expected, _ = merged(whole, work, stored, step=8 * CHUNK)
        narrow = array_kernel(replace(device, worker_bytes=1))
        with narrow.running():
            assert merged(narrow, work, stored, step=8 * CHUNK)[0].tobytes() == expected.tobytes()
            assert merged(narrow, work, stored, [2 * CHUNK], 2 * CHUNK)[0].tobytes() == expected.tobytes()
            assert by_workers(narrow, work, stored, 3, 2 * CHUNK) == expected.tobytes()


def by_workers(kernel: ArrayKernel, work: Work, stored: Sequence[Array], workers: int, span: int) -> bytes:
    out = np.zeros(work.size * work.out.bytes, np.uint8)

    def walk_span(worker: int, owner: Any, pass_: Pass, first: int, count: int) -> Any:
        del worker, owner
        return walk(work, stored, pass_, first, count, CHUNK, out)[0]

    scheduler: Scheduler[Pass] = Scheduler(walk_span, workers, span)
    scheduler.run(iter([Job(None, kernel.merge(work), work.size)]))
    return out.tobytes()


def test_slices_start_where_sums_do() -> None:
    assert PLAN_GRAIN % CHUNK == 0


class LiveBytes:
    """The most bytes that tensors made meanwhile took at a time; torch tells of every operation in this thread."""

    def __init__(self, torch: Any) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.now = self.most = 0
        known: set[int] = set()

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(mode, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                for each in result if isinstance(result, tuple | list) else [result]:
                    if isinstance(each, torch.Tensor):
                        self.see(each.untyped_storage(), known)
                return result

        self.watch = Watch()  # type: ignore[no-untyped-call]

    def see(self, storage: Any, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in known:
            return
        known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size, known)

    def forget(self, key: int, size: int, known: set[int]) -> None:
        known.discard(key)
        self.now -= size


@pytest.mark.parametrize("compute", ["bfloat16", "float64"])
@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
@pytest.mark.parametrize("merge_type", MERGES)
def test_a_device_holds_no_more_than_it_may(merge_type: str, sparsify_type: str | None, compute: str) -> None:
    """The most that is alive at a time of what would be in a GPU's memory."""
    torch = import_library("torch")
    kind, models = FLOATS[compute], 2 if merge_type == "slerp" else 5
    stored = some_models(24 * CHUNK, (kind,) * (models + 1), 4)
    method = applied(merge_type, sparsify_type, (1.0,) * models, normalize=True, epsilon=0.5, reserve_p=0.5)
    work = work_on(stored, [kind] * (models + 1), method, True, kind)
    kernel = array_kernel(Device("pt", worker_bytes=LEAST_GPU_WORKER_BYTES))
    live = LiveBytes(torch)
    with kernel.running(), live.watch:
        merged(kernel, work, stored, step=24 * CHUNK)
    assert LEAST_GPU_WORKER_BYTES / 20 < live.most <= LEAST_GPU_WORKER_BYTES


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_values_are_rounded_as_the_compiled_kernels_do(kernel: ArrayKernel, compute: str, dtype: str) -> None:
    random = np.ldexp(np.random.default_rng(1).uniform(-2, 2, 3000), np.random.default_rng(2).integers(-140, 130, 3000))
    special = [0.0, -0.0, np.inf, -np.inf, np.nan]
    values = SINGLES if compute == "float32" else np.concatenate([double_rounding_traps(), random, special])
    kind = FLOATS[dtype]
    ours = np.empty(kind.nbytes(values.size), np.uint8)
    arithmetic, library = Arithmetic(kernel.library, compute), kernel.library
    with library.working():
        encoded = arithmetic.encode(library.to_device(values), kind)
        library.store(encoded, ours)
        not_finite = int(library.fetch(arithmetic.count_bad(encoded)))
    theirs = np.empty_like(ours)
    bad = merge_loops.encode(RAW_CODES[kind.name], values, values.size, theirs, 0)
    stored = {8: np.float64, 4: np.float32, 2: np.uint16 if kind is BF16 else np.float16}[kind.bytes]
    with np.errstate(invalid="ignore"):
        same_values(ours.view(stored), theirs.view(stored), dtype)
    assert not_finite == bad


@pytest.mark.parametrize("kind", [BF16, F16], ids=str)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_every_half_is_widened_exactly(library: Library, compute: str, kind: DType) -> None:
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    stored = halves if kind is BF16 else halves.view(np.float16)
    wide = Arithmetic(library, compute).decode(library.load(halves.view(np.uint8), kind))
    same_values(library.fetch(wide), load(stored, kind, compute), str(kind))


@pytest.mark.parametrize("first", [0, 12346, 2**31 - 2, 2**40])
@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, stream_key(3, 1, "w")])
def test_draws_are_the_definition_s(library: Library, key: int, first: int) -> None:
    arithmetic = Arithmetic(library, "float32")
    ours = library.fetch(arithmetic.draws(arithmetic.counters(first, 5001), key, 5001))
    np.testing.assert_array_equal(ours, draws(key, first, 5001))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sparsify_type", ["trim", "magprune"])
def test_magnitudes_that_strain_tallies(kernel: ArrayKernel, sparsify_type: str, dtype: str) -> None:
    size, kind = CHUNK + 1001, FLOATS[dtype]
    other = np.random.default_rng(1).normal(size=size).astype(dtype) * np.float32(1e3)
    for name, reserve_p in itertools.product(NAMES, (0.7, 0.31) if sparsify_type == "trim" else (0.5,)):
        stored = [distributions(size, dtype)[name].astype(dtype), other]
        method = applied("linear", sparsify_type, (1.0, 0.5), reserve_p=reserve_p, epsilon=0.2)
        work = work_on(stored, [kind] * 2, method, False, kind)
        same_values(merged(kernel, work, stored, [CHUNK])[0], drive(work, stored, [CHUNK], 4 * CHUNK)[0], name)


@pytest.mark.parametrize("kind", FLOATS.values(), ids=str)
def test_slerp_s_sums_are_exact(kernel: ArrayKernel, kind: DType) -> None:
    """Of the products as float64 holds them, whatever cancels."""
    random = np.random.default_rng(8)
    values = [random.normal(size=2 * CHUNK + 9) * np.exp2(random.integers(-9, 9, 2 * CHUNK + 9)) for _ in range(2)]
    stored = [store(each, kind) for each in values]
    found: list[tuple[Any, Any]] = []
    work = work_on(stored, [kind] * 2, applied("slerp", None, (1.0, 1.0)), False, kind)
    drive(work, stored, [CHUNK], procedure=kernel.merge(work), passes=found)
    sums = np.concatenate(next(result for pass_, result in found if isinstance(pass_, DotProducts)), axis=1)
    x, y = (load(each, kind, "float64") for each in stored)
    for ours, (a, b) in zip(sums, ((x, x), (y, y), (x, y)), strict=True):
        assert math.fsum(ours.tolist()) == math.fsum((a * b).tolist())


# NaN and infinities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
@pytest.mark.parametrize("merge_type", MERGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_nonfinite_elements_are_counted_and_go_where_they_go_in_the_compiled_kernels(
    kernel: ArrayKernel, dtype: str, merge_type: str, sparsify_type: str | None
) -> None:
    kind, size = FLOATS[dtype], CHUNK + 2
    values = [np.random.default_rng(model).normal(size=size) for model in range(3)]
    values[0][[0, 1024, size - 1]] = np.nan, np.inf, -np.inf
    values[2][7] = np.inf
    stored = [store(each, kind) for each in values]
    method = a_method(merge_type, sparsify_type, 2, reserve_p=0.5, ties_elect_type="count")
    work = work_on(stored, [kind] * 3, method, True, kind)
    with np.errstate(all="ignore"):
        ours, bad = merged(kernel, work, stored)
        theirs, bad_too = drive(work, stored)
        same_values(ours, theirs, dtype)
    assert bad.tolist() == bad_too.tolist()
    assert bad[:-1].tolist() == [3, 0, 1]


def test_torch_gets_its_threads_back() -> None:
    torch = import_library("torch")
    before = torch.get_num_threads()
    with array_kernel(Device("pt")).running():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

"""One suite over all methods: what must hold of any merge, whatever the data, the settings and the workers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from definitions import MERGES, SPARSIFIERS, applied, changed, merge_tensor
from driving import FLOATS, GRAIN, STORED, drive, load, store, walk, work_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelfuse.dtypes import F64, DType
from modelfuse.execution.scheduler import Job, Scheduler
from modelfuse.kernels import Pass, Work
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.methods.applied import Applied

Array = npt.NDArray[Any]

settings.register_profile("modelfuse", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("modelfuse")

#: What no sum of five times the largest weight overflows, in the narrowest type.
LARGEST = 4000.0
WEIGHTS = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, -1.0, 1 / 3, 1e-9]), st.floats(-2, 2, allow_nan=False, allow_subnormal=False)
)


@dataclass(frozen=True)
class Case:
    """A merge of one tensor, as checkpoints would hold it."""

    sources: tuple[DType, ...]
    has_base: bool
    out: DType
    method: Applied
    stored: tuple[Array, ...]

    @property
    def work(self) -> Work:
        return work_on(self.stored, self.sources, self.method, self.has_base, self.out)

    @property
    def values(self) -> list[Array]:
        """All in the compute type."""
        return [load(each, kind, self.work.compute) for each, kind in zip(self.stored, self.sources, strict=True)]

    def defined(self) -> Array:
        """The merge by definition, in the compute type."""
        values = self.values
        base = values.pop() if self.has_base else None
        with np.errstate(under="ignore"):
            return merge_tensor(values, base, self.method, self.work.name)


@st.composite
def elements(draw: st.DrawFn, size: int) -> Array:
    """Values with repetitions, zeros of both signs, subnormals and extremes.

    Drawn few and dealt out at random: what matters of a large tensor is its kinds of values, not each of them.
    """
    palette = draw(
        st.lists(
            st.one_of(
                st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 1e-40, 5e-324, 2.0**-126, LARGEST, -LARGEST]),
                st.floats(-LARGEST, LARGEST),
                st.floats(-1e-3, 1e-3),
            ),
            min_size=1,
            max_size=12,
        )
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.choice(palette, size)
    if draw(st.booleans()):
        values = np.where(random.random(size) < 0.5, values, random.normal(0, 0.02, size))
    return values


@st.composite
def cases(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int] | None = None,
    merges: Sequence[str] = tuple(MERGES),
    sparsifiers: Sequence[str | None] = (None, *SPARSIFIERS),
) -> Case:
    merge_type = draw(st.sampled_from(merges))
    sparsify_type = draw(st.sampled_from(sparsifiers))
    models = 2 if merge_type == "slerp" else draw(st.integers(2, 5))
    has_base = draw(st.booleans())
    one = draw(st.sampled_from(list(FLOATS.values())))
    kinds = [draw(st.sampled_from(list(FLOATS.values()))) for _ in range(models + has_base)]
    sources = tuple(kinds) if draw(st.booleans()) else (one,) * (models + has_base)
    size = draw(sizes if sizes is not None else st.sampled_from([1, 2, 3, 17, 1024, 1025, 4097]))
    margin = draw(st.floats(0.01, 0.49))
    reserve_p = draw(st.floats(margin, 1 - margin))
    method = applied(
        merge_type,
        sparsify_type,
        tuple(draw(st.lists(WEIGHTS, min_size=models, max_size=models))),
        normalize=draw(st.booleans()),
        slerp_alpha=draw(st.floats(0, 1)),
        ties_elect_type=draw(st.sampled_from(["sum", "count"])),
        rescale=draw(st.booleans()),
        reserve_p=reserve_p,
        epsilon=1.9 * min(reserve_p, 1 - reserve_p) * draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    stored = tuple(store(draw(elements(size)), kind) for kind in sources)
    return Case(sources, has_base, draw(st.sampled_from([one, *FLOATS.values()])), method, stored)


SMALL = st.sampled_from([1, 2, 3, 17, 200, 1025])
SEVERAL_SPANS = st.sampled_from([GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 17])


def merged(case: Case, spans: Sequence[int] = (), step: int = GRAIN) -> bytes:
    with np.errstate(all="ignore"):
        return drive(case.work, case.stored, spans, step)[0].tobytes()


def merged_by_workers(case: Case, workers: int, span: int) -> bytes:
    """The bytes that several workers make of it."""
    out = np.zeros(case.work.size * case.work.out.bytes, np.uint8)

    def walk_span(worker: int, owner: Any, pass_: Pass, first: int, count: int) -> Any:
        del worker, owner
        return walk(case.work, case.stored, pass_, first, count, GRAIN, out)[0]

    scheduler: Scheduler[Pass] = Scheduler(walk_span, workers, span)
    scheduler.run(iter([Job(None, merge_procedure(case.work), case.work.size)]))
    assert threading.active_count() >= 1
    return out.tobytes()


@settings(max_examples=40)
@given(case=cases(sizes=SEVERAL_SPANS), slices=st.integers(1, 4), spans=st.sets(st.integers(1, 3)))
def test_slices_and_spans_change_no_byte(case: Case, slices: int, spans: set[int]) -> None:
    edges = [edge * GRAIN for edge in sorted(spans) if edge * GRAIN < case.work.size]
    assert merged(case, edges, slices * GRAIN) == merged(case)


@settings(max_examples=25)
@given(case=cases(sizes=SEVERAL_SPANS), workers=st.integers(1, 5), span=st.integers(1, 3))
def test_workers_change_no_byte(case: Case, workers: int, span: int) -> None:
    assert merged_by_workers(case, workers, span * GRAIN) == merged(case)


@settings(max_examples=30)
@given(case=cases())
def test_the_same_request_gives_the_same_bytes(case: Case) -> None:
    assert merged(case) == merged(case)


@settings(max_examples=120)
@given(case=cases(merges=("linear", "ties"), sparsifiers=(None, "trim", "dare")))
def test_kernels_equal_definitions_and_round_once(case: Case) -> None:
    """The stored bytes are those of the definition, rounded once into the output's type."""
    assert merged(case) == store(case.defined(), case.out).tobytes()


def magnitude_sums(case: Case) -> Array:
    """An element's bound on the terms of its merge, with what sparsifying may have scaled them by."""
    values = [np.abs(value.astype(np.float64)) for value in case.values]
    base = values.pop() if case.has_base else np.zeros_like(values[0])
    keep = (
        case.method.shared.reserve_p - case.method.shared.epsilon / 2
        if case.method.sparsify_type == "magprune"
        else 1.0
    )
    weights = case.method.weights if case.method.merge_type != "slerp" else (1.0,) * 2
    scaled = sum(abs(weight) * (value + base) for value, weight in zip(values, weights, strict=True))
    bound: Array = scaled / keep + base
    return bound


@settings(max_examples=60)
@given(case=cases(merges=("slerp",), sparsifiers=(None, "trim", "dare")))
def test_slerp_equals_its_definition_up_to_the_rounding_of_sums(case: Case) -> None:
    """The angle of nearly opposite tensors is known no better than the dot product's rounding: those are left out."""
    case = replace(case, out=F64)
    values = case.values
    base = values.pop() if case.has_base else None
    with np.errstate(under="ignore"):
        plain = (
            changed(case.method, merge_type="linear", weights=(1.0, 0.0)),
            changed(case.method, merge_type="linear", weights=(0.0, 1.0)),
        )
        zero = np.zeros_like(values[0])
        deltas = [value if base is None else value - base for value in values]
        one, two = (merge_tensor(deltas, None, each, "w").astype(np.float64) + zero for each in plain)
    norms = np.sqrt(one @ one), np.sqrt(two @ two)
    if min(norms) < 1e-7 or abs(one @ two) > 0.999 * norms[0] * norms[1]:
        return
    ours = drive(case.work, case.stored)[0]
    theirs = case.defined().astype(np.float64)
    room = 1e-6 if case.work.compute == "float32" else 1e-11
    factor = 1 / (np.sqrt(1 - 0.999**2))
    base_size = np.zeros_like(one) if base is None else np.abs(base.astype(np.float64))
    bound = room * (factor * (np.abs(one) + np.abs(two)) + base_size) + 1e-44
    assert (np.abs(ours - theirs) <= bound).all()


@settings(max_examples=60)
@given(case=cases(sizes=SMALL, sparsifiers=("magprune",), merges=("linear",)))
def test_magprune_keeps_with_the_probability_of_the_rank(case: Case) -> None:
    """Each element is dropped or kept as its exact rank says, unless its draw lies within 1e-4 of the border."""
    models = case.work.models
    method = changed(case.method, weights=(1.0,) + (0.0,) * (models - 1), rescale=False)
    case = replace(case, method=method, out=F64)
    values = case.values
    base = values.pop() if case.has_base else None
    x = values[0] if base is None else values[0] - base
    ours = drive(case.work, case.stored)[0]
    lower, upper = (
        replace(case, method=changed(method, reserve_p=method.shared.reserve_p + sign * 1.01e-4)) for sign in (-1, 1)
    )
    certain = (lower.defined() != 0) == (upper.defined() != 0)
    defined = case.defined().astype(np.float64)
    if base is None:
        size = np.unique(np.abs(x)).size
        assert size > 0
        # Magnitudes that are equal share a mean rank, those that share a bin too: nothing certain may differ.
        np.testing.assert_array_equal(ours[certain], defined[certain])


def permuted(case: Case, order: Sequence[int]) -> Case:
    """The same models in another order, the base still last."""
    full = [*order, *range(case.work.models, len(case.sources))]
    method = changed(case.method, weights=tuple(case.method.weights[number] for number in order))
    sources, stored = (tuple(each[number] for number in full) for each in (case.sources, case.stored))
    return replace(case, sources=sources, stored=stored, method=method)


@settings(max_examples=80)
@given(case=cases(merges=("linear",), sparsifiers=(None, "trim")), data=st.data())
def test_the_order_of_models_changes_a_linear_merge_by_rounding_only(case: Case, data: st.DataObject) -> None:
    """Draws depend on a model's position, so dare and magprune are left out."""
    case = replace(case, out=F64, method=changed(case.method, rescale=False))
    other = permuted(case, data.draw(st.permutations(range(case.work.models))))
    first, second = (drive(each.work, each.stored)[0] for each in (case, other))
    eps = float(np.finfo(case.work.compute).eps)
    assert (np.abs(first - second) <= 16 * eps * magnitude_sums(case) + 1e-44).all()


@settings(max_examples=80)
@given(case=cases(merges=("ties",), sparsifiers=(None, "trim")), data=st.data())
def test_the_order_of_models_changes_ties_by_rounding_only(case: Case, data: st.DataObject) -> None:
    """Where the vote is close, another order of summing may elect another sign: such elements are left out."""
    case = replace(case, out=F64, method=changed(case.method, rescale=False, normalize=False))
    other = permuted(case, data.draw(st.permutations(range(case.work.models))))
    first, second = (drive(each.work, each.stored)[0] for each in (case, other))
    eps = float(np.finfo(case.work.compute).eps)
    bound = magnitude_sums(case)
    linear = replace(case, method=changed(case.method, merge_type="linear"))
    votes = linear.defined().astype(np.float64)
    if case.has_base:
        votes -= case.values[-1]
    clear = (
        np.full(votes.shape, True)
        if case.method.shared.ties_elect_type == "count"
        else np.abs(votes) > 64 * eps * bound
    )
    assert (np.abs(first - second)[clear] <= 16 * eps * bound[clear] + 1e-44).all()


@settings(max_examples=60)
@given(case=cases(merges=("linear",), sparsifiers=(None,)), chosen=st.integers(0, 4))
def test_weight_one_of_one_model_gives_that_model(case: Case, chosen: int) -> None:
    """To the bit without a base, but for the sign of zeros; with one, up to the rounding of the difference."""
    chosen %= case.work.models
    weights = tuple(float(number == chosen) for number in range(case.work.models))
    case = replace(case, out=case.sources[chosen], method=changed(case.method, weights=weights))
    ours = drive(case.work, case.stored)[0]
    if case.has_base:
        ours, theirs = (load(each, case.out, "float64") for each in (ours, case.stored[chosen]))
        eps = float(np.finfo(case.work.compute).eps) + {"BF16": 2.0**-8, "F16": 2.0**-11}.get(case.out.name, 0.0)
        sizes = np.abs(theirs) + np.abs(case.values[-1].astype(np.float64))
        assert (np.abs(ours - theirs) <= 2 * eps * sizes + 6e-8).all()
    else:
        np.testing.assert_array_equal(load(ours, case.out, "float64"), load(case.stored[chosen], case.out, "float64"))


@settings(max_examples=60)
@given(case=cases(sizes=SMALL, merges=("linear",), sparsifiers=tuple(SPARSIFIERS)))
def test_rescaling_changes_no_choice(case: Case) -> None:
    """What is dropped is the same with and without, and what is kept is scaled up, never down."""
    models = case.work.models
    case = replace(case, out=F64, method=changed(case.method, weights=(1.0,) + (0.0,) * (models - 1), rescale=False))
    if case.has_base:
        return
    plain = drive(case.work, case.stored)[0]
    scaled_case = replace(case, method=changed(case.method, rescale=True))
    scaled = drive(scaled_case.work, case.stored)[0]
    np.testing.assert_array_equal(plain != 0, scaled != 0)
    assert (np.abs(scaled) >= np.abs(plain)).all()
    kept = plain != 0
    np.testing.assert_array_equal(plain[kept], case.values[0][kept])


@settings(max_examples=40)
@given(case=cases(merges=("linear", "ties"), sparsifiers=(None, *SPARSIFIERS)))
def test_a_merge_of_zeros_is_zero(case: Case) -> None:
    zeros = tuple(np.zeros(each.size, STORED[kind.name]) for each, kind in zip(case.stored, case.sources, strict=True))
    merged = drive(case.work, zeros)[0]
    assert not load(merged, case.out, "float64").any()  # Zeros of either sign: a weight may be negative.


@pytest.mark.parametrize("merge_type", MERGES)
@pytest.mark.parametrize("sparsify_type", [None, *SPARSIFIERS])
def test_models_equal_to_their_base_give_it_back(merge_type: str, sparsify_type: str | None) -> None:
    """To the bit: a model that was not tuned changes nothing."""
    for kind in FLOATS.values():
        base = store(np.random.default_rng(3).normal(size=2000), kind)
        method = applied(merge_type, sparsify_type, (0.25, 1.5))
        ours, _ = drive(work_on([base] * 3, [kind] * 3, method, True, kind), [base] * 3)
        assert ours.tobytes() == base.tobytes()

"""The definitions, against values worked out by hand."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from definitions import (
    MERGE_METHODS,
    MERGES,
    SPARSIFIERS,
    applied,
    dare,
    linear,
    magprune,
    merge_tensor,
    parameters,
    slerp,
    ties,
    trim,
)

from modelfuse.methods import registry
from modelfuse.methods.applied import Applied
from modelfuse.methods.arrays import total
from modelfuse.methods.magprune import keep_probability
from modelfuse.methods.random import draws, stream_key
from modelfuse.methods.slerp import coefficients
from modelfuse.methods.trim import kept_from, scale
from modelfuse.recipe.names import SETTINGS
from modelfuse.recipe.recipe import Recipe

Array = npt.NDArray[Any]
#: A draw that keeps whatever can be kept, and one that drops whatever can be dropped.
KEEP, DROP = 0.0, 1 - 2.0**-24


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def f64(*values: float) -> Array:
    return np.array(values, np.float64)


# linear ---------------------------------------------------------------------------------------------------------------


def test_linear_is_the_weighted_sum() -> None:
    # 0.5·1 + 0.25·8 = 2.5 and 0.5·(−2) + 0.25·4 = 0
    assert linear([f32(1, -2), f32(8, 4)], (0.5, 0.25)).tolist() == [2.5, 0]


def test_linear_of_five_models() -> None:
    # 1·1 + 2·10 + 3·100 + 4·1000 − 5·10000
    xs = [f64(10.0**power) for power in range(5)]
    assert linear(xs, (1, 2, 3, 4, -5)).tolist() == [1 + 20 + 300 + 4000 - 50000]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_linear_computes_in_the_type_it_is_given(dtype: type) -> None:
    """A third is rounded into it, each product is, and each sum: 1/3 + 1/3 + 1/3 of 1 is not always 1."""
    third = dtype(1 / 3)
    result = linear([np.ones(1, dtype)] * 3, (1 / 3,) * 3)
    assert result.dtype == dtype
    assert result[0] == (third + third) + third


def test_a_base_is_subtracted_first_and_added_last() -> None:
    # x − b: (1, 2) and (3, −2); halves: 0.5 + 1.5 = 2 and 1 − 1 = 0; plus b: 12 and 20
    method = applied("linear", None, (0.5, 0.5))
    merged = merge_tensor([f32(11, 22), f32(13, 18)], f32(10, 20), method, "w")
    assert merged.tolist() == [12, 20]


# slerp ----------------------------------------------------------------------------------------------------------------


def test_slerp_of_a_right_angle() -> None:
    # θ = 90°: sin 45° / sin 90° = √½ of each, whatever their lengths.
    half = math.sqrt(0.5)
    assert slerp([f64(2, 0), f64(0, 4)]).tolist() == pytest.approx([2 * half, 4 * half], rel=1e-15)


def test_slerp_of_60_degrees_a_third_of_the_way() -> None:
    # θ = 60°, α = 1/3: sin 40° / sin 60° of the first, sin 20° / sin 60° of the second; it lies at 20° on the circle.
    first, second = f64(1, 0), f64(0.5, math.sqrt(0.75))
    result = slerp([first, second], slerp_alpha=1 / 3)
    assert result.tolist() == pytest.approx([math.cos(math.radians(20)), math.sin(math.radians(20))], rel=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slerp_ends_are_the_models(dtype: type) -> None:
    first: Array = np.array([1, 2, 3], dtype)
    second: Array = np.array([-3, 1, 7], dtype)
    assert slerp([first, second], slerp_alpha=0).tolist() == first.tolist()
    assert slerp([first, second], slerp_alpha=1).tolist() == second.tolist()


def test_slerp_of_colinear_tensors_is_straight() -> None:
    # cos θ = 1 > 0.9995: 0.75·(1, 2) + 0.25·(3, 6) = (1.5, 3)
    assert slerp([f32(1, 2), f32(3, 6)], slerp_alpha=0.25).tolist() == [1.5, 3]


def test_slerp_of_opposite_tensors_is_straight() -> None:
    # cos θ = −1, |cos θ| > 0.9995: 0.75·(1, 2) + 0.25·(−1, −2) = (0.5, 1)
    assert slerp([f32(1, 2), f32(-1, -2)], slerp_alpha=0.25).tolist() == [0.5, 1]


def test_slerp_threshold_is_exclusive() -> None:
    # cos θ = 0.6 exactly: above 0.5 it is straight, at 0.6 it is not.
    xs = [f64(1, 0), f64(0.6, 0.8)]
    straight = 0.5 * xs[0] + 0.5 * xs[1]
    assert slerp(xs, slerp_dot_threshold=0.5).tolist() == straight.tolist()
    arc = slerp(xs, slerp_dot_threshold=0.6)
    assert arc.tolist() != straight.tolist()
    assert arc @ arc == pytest.approx(1, rel=1e-14)


def test_slerp_threshold_of_one_and_parallel_tensors() -> None:
    """The sine is zero, so the arc is a point: straight."""
    assert slerp([f32(2, 0), f32(4, 0)], slerp_dot_threshold=1.0).tolist() == [3, 0]


def test_slerp_with_a_zero_tensor() -> None:
    # d = 0, so θ = 90° and the factors are √½; the zero adds nothing.
    assert slerp([f64(0, 0), f64(3, 4)]).tolist() == pytest.approx([3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])
    assert slerp([f64(0, 0), f64(0, 0)]).tolist() == [0, 0]


def test_slerp_does_not_divide_by_norms_up_to_eps() -> None:
    # ‖x₁‖ = 0.5 ≤ 0.5 is not divided by: d = (0.5, 0)·(1, 0) = 0.5, so θ = 60° though the tensors are parallel.
    xs = [f64(0.5, 0), f64(2, 0)]
    arc = math.sin(math.radians(30)) / math.sin(math.radians(60))
    assert slerp(xs, slerp_normalize_eps=0.5).tolist() == pytest.approx([2.5 * arc, 0], rel=1e-14)
    assert slerp(xs, slerp_normalize_eps=0.49).tolist() == [1.25, 0]


def test_slerp_sums_over_the_whole_tensor_not_its_rows() -> None:
    xs = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [-1.0, 0.0]])]
    assert slerp(xs).ravel().tolist() == pytest.approx((math.sqrt(0.5) * (xs[0] + xs[1])).ravel().tolist())


def test_slerp_sums_in_float64() -> None:
    """2²⁴ + 1 + 1 … in float32 would never grow: the tensors would seem parallel."""
    first, second = f32(4096, *[1.0] * 10_000), f32(4096, *[-1.0] * 10_000)
    # cos θ = (2²⁴ − 10⁴) / (2²⁴ + 10⁴) < 0.9995; half-way, both factors are 1 / (2 cos θ/2).
    cosine = (2**24 - 10**4) / (2**24 + 10**4)
    factor = np.float32(1 / math.sqrt(2 + 2 * cosine))
    assert slerp([first, second])[0] == pytest.approx(float(factor) * 8192, rel=1e-7)
    assert factor > np.float32(0.5)


def test_slerp_of_overflowing_sums_is_nan() -> None:
    assert all(math.isnan(each) for each in coefficients(math.inf, math.inf, math.nan, 0.5, 1e-8, 0.9995))


# ties -----------------------------------------------------------------------------------------------------------------


def test_ties_keeps_those_that_agree_with_the_sum() -> None:
    # 3 + 2 − 4 = 1 ≥ 0: 3 + 2 = 5.   −1 + 2 − 3 = −2 < 0: −1 − 3 = −4.
    assert ties([f32(3, -1), f32(2, 2), f32(-4, -3)], (1, 1, 1)).tolist() == [5, -4]


def test_ties_can_elect_by_count() -> None:
    # Two of three are negative, though the sum is positive: −1 − 1 = −2 by count, 5 by sum.
    xs = [f32(5), f32(-1), f32(-1)]
    assert ties(xs, (1, 1, 1), ties_elect_type="count").tolist() == [-2]
    assert ties(xs, (1, 1, 1), ties_elect_type="sum").tolist() == [5]


@pytest.mark.parametrize("elect", ["sum", "count"])
def test_ties_exact_cancellation_elects_plus(elect: str) -> None:
    assert ties([f32(2), f32(-2)], (1, 1), ties_elect_type=elect).tolist() == [2]
    assert ties([f32(-2), f32(2)], (1, 1), ties_elect_type=elect).tolist() == [2]


def test_ties_count_of_a_draw_elects_plus() -> None:
    # One plus, one minus, one zero: 0 ≥ 0, so +: 1, though the sum is −8.
    assert ties([f32(1), f32(-9), f32(0)], (1, 1, 1), ties_elect_type="count").tolist() == [1]


def test_ties_zeros_agree_with_nobody() -> None:
    # With normalize 6 is divided by 2, not by 3: the zero does not agree. All zeros: 0, divided by nothing.
    xs = [f32(6, 0), f32(0, -0.0)]
    assert ties(xs, (2, 1), normalize=True).tolist() == [6, 0]
    assert not np.signbit(ties(xs, (2, 1))[1])


def test_ties_normalize_divides_by_the_agreeing_weights() -> None:
    # y: 2·3 = 6, 1·2 = 2, 3·(−1) = −3; + elected: (6 + 2) / (2 + 1)
    xs = [f64(3), f64(2), f64(-1)]
    assert ties(xs, (2, 1, 3), normalize=True).tolist() == [8 / 3]
    assert ties(xs, (2, 1, 3)).tolist() == [8]


def test_ties_negative_weights_turn_the_sign() -> None:
    # y: −2·3 = −6 and 1·4 = 4; sum −2, so −6; divided by −2 it is 3 again.
    xs = [f32(3), f32(4)]
    assert ties(xs, (-2, 1)).tolist() == [-6]
    assert ties(xs, (-2, 1), normalize=True).tolist() == [3]


def test_ties_does_not_divide_by_weights_that_cancel() -> None:
    # y: 1·2 = 2 and −1·−3 = 3 agree, their weights sum to 0: 5 stays 5.
    assert ties([f32(2), f32(-3)], (1, -1), normalize=True).tolist() == [5]
    # A sum of 1e-9 is below 1e-8 too; 1e-7 is not.
    assert ties([f64(2.0), f64(-2.0)], (1e-9, 1e-12), normalize=True).tolist() == [2e-9]
    assert ties([f64(2.0), f64(-2.0)], (1e-7, 1e-12), normalize=True).tolist() == pytest.approx([2])


def test_ties_of_equal_weights_and_an_exact_cancellation() -> None:
    """Weights that are absent arrive as ones: thirds in float32 would not cancel."""
    recipe = Recipe.parse({"model_path_list": ["a", "b", "c"], "merge_type": "ties"})
    assert (recipe.method.weights, recipe.method.shared.normalize) == ((1.0, 1.0, 1.0), True)
    xs = [f32(0.1), f32(0.2), f32(-0.3)]
    votes = (xs[0] + xs[1]) + xs[2]
    expected = (xs[0] + xs[1]) / np.float32(2) if votes[0] >= 0 else xs[2]
    assert merge_tensor(xs, None, recipe.method, "w").tolist() == expected.tolist()


# trim -----------------------------------------------------------------------------------------------------------------


def test_trim_keeps_the_largest() -> None:
    # Magnitudes 1 2 3 4 5, half kept: the quantile 0.5 is 3, so 3, −4 and 5 stay. 15 / 12 = 1.25.
    x = f32(1, -4, 3, 2, 5)
    assert trim(x, reserve_p=0.5, rescale=False).tolist() == [0, -4, 3, 0, 5]
    assert trim(x, reserve_p=0.5).tolist() == [0, -5, 3.75, 0, 6.25]


def test_trim_threshold_is_interpolated() -> None:
    # Magnitudes 1 2 3 4: the quantile 0.5 is 2.5, so 3 and 4 stay.
    assert trim(f32(1, 2, 3, 4), reserve_p=0.5, rescale=False).tolist() == [0, 0, 3, 4]


def test_trim_takes_the_decimal_that_was_written() -> None:
    """1 − 0.7 is 0.30000000000000004 in floats, of which ten steps are more than three."""
    # 11 elements: the quantile 0.3 lies at 0.3·10 = 3 exactly, so the element of rank 3 stays: 8 are kept.
    assert (1 - 0.7) * 10 > 3
    x = f64(*range(1, 12))
    assert np.count_nonzero(trim(x, reserve_p=0.7)) == 8
    assert kept_from(11, 0.7) == 3
    assert kept_from(101, 0.9) == 10
    assert kept_from(1001, 0.999) == 1


def test_trim_keeps_equal_magnitudes_at_the_threshold() -> None:
    # Magnitudes 1 2 2 2 3: the quantile 0.6 lies at 2.4, between 2 and 2: all twos stay.
    assert trim(f32(2, -2, 3, 2, 1), reserve_p=0.4, rescale=False).tolist() == [2, -2, 3, 2, 0]


def test_trim_of_everything_and_of_nothing_but_the_largest() -> None:
    x = f32(-1, 0, 7, 2)
    assert trim(x, reserve_p=1.0).tolist() == x.tolist()
    # The quantile 0.999 of four lies at 2.997, above 2: 7 stays, × 10/7.
    assert trim(x, reserve_p=0.001).tolist() == [0, 0, np.float32(7) * np.float32(10 / 7), 0]


def test_trim_of_one_element_and_of_none() -> None:
    assert trim(f32(-3), reserve_p=0.01).tolist() == [-3]
    assert trim(f32(), reserve_p=0.5).tolist() == []


def test_trim_does_not_rescale_sums_that_are_almost_nothing() -> None:
    # 1e-9 + 3e-9 < 1e-8
    assert trim(f64(1e-9, 3e-9), reserve_p=0.5).tolist() == [0, 3e-9]
    assert scale(1e-8, 1e-8) == 1
    assert scale(2e-8, 1e-8) == 2
    assert scale(2e-8, 0.99e-8) == 1
    assert trim(f32(0, 0, 0)).tolist() == [0, 0, 0]


def test_trim_does_not_rescale_by_sums_that_are_not_finite() -> None:
    assert scale(math.inf, math.inf) == 1
    assert trim(f32(math.inf, 1, 2, 3), reserve_p=0.5).tolist() == [math.inf, 0, 0, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 100, 101, 1001])
@pytest.mark.parametrize("reserve_p", [0.01, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.9, 0.99, 1.0])
def test_trim_threshold_is_numpys_quantile(size: int, reserve_p: float) -> None:
    """Checked between elements, where numpy's rounding of 1 − p cannot matter; at one, that exact decimals count."""
    x = np.random.default_rng(size).normal(size=size)
    position = (1 - Fraction(str(reserve_p))) * (size - 1)
    kept = np.flatnonzero(trim(x, reserve_p=reserve_p, rescale=False))
    if position.denominator == 1:
        expected = np.argsort(np.abs(x))[int(position) :]
    else:
        expected = np.flatnonzero(np.abs(x) >= np.quantile(np.abs(x), 1 - reserve_p))
    assert sorted(kept) == sorted(expected)


def test_trim_sums_are_exact() -> None:
    """Any order of summing floats would lose the small ones beside 2⁵³."""
    x = f64(2.0**53, 1.0, 1.0, 1.0, 1.0)
    assert total(x) == 2.0**53 + 4
    assert math.isnan(total(f64(math.inf, -math.inf)))
    assert math.isnan(total(f64(1.7e308, 1.7e308)))


# dare -----------------------------------------------------------------------------------------------------------------


def test_dare_keeps_where_the_draw_is_below_p() -> None:
    # Kept below 0.5, not at it; what is kept is divided by 0.5.
    drawn = f32(0.1, 0.5, 0.49999997, 0.9)
    assert dare(f32(1, 2, -3, 4), drawn, reserve_p=0.5).tolist() == [2, 0, -6, 0]
    assert dare(f32(1, 2, -3, 4), drawn, reserve_p=0.5, rescale=False).tolist() == [1, 0, -3, 0]


def test_dare_with_p_one_keeps_all() -> None:
    x = f32(1, -2, 0)
    assert dare(x, f32(KEEP, DROP, DROP), reserve_p=1.0).tolist() == x.tolist()


@pytest.mark.parametrize("reserve_p", [0.1, 0.5, 0.9])
def test_dare_preserves_the_mean(reserve_p: float) -> None:
    # The mean of 2²⁰ ones is 1 with a deviation of √((1 − p) / p / 2²⁰); 5 of them are allowed.
    size = 1 << 20
    x = np.ones(size)
    mean = dare(x, draws(stream_key(0, 0, "w"), 0, size), reserve_p=reserve_p).mean()
    assert abs(mean - 1) < 5 * math.sqrt((1 - reserve_p) / reserve_p / size)


# magprune -------------------------------------------------------------------------------------------------------------


def test_magprune_probabilities_by_rank() -> None:
    # p = 0.5, ε = 0.4, n = 4: ranks 0 1 2 3 are kept with 0.7 0.6 0.5 0.4.
    ranks = np.arange(4.0)
    assert keep_probability(ranks, 4, 0.5, 0.4).tolist() == pytest.approx([0.7, 0.6, 0.5, 0.4])
    # The largest is 4, rank 0. All are kept, divided by their probabilities.
    kept = magprune(f64(1, -4, 2, 3), f32(*[KEEP] * 4), reserve_p=0.5, epsilon=0.4)
    assert kept.tolist() == pytest.approx([1 / 0.4, -4 / 0.7, 2 / 0.5, 3 / 0.6])


def test_magprune_drops_where_the_draw_is_not_below() -> None:
    # Kept with 0.4 0.7 0.5 0.6, as above.
    drawn = f32(0.39, 0.71, 0.51, 0.59)
    kept = magprune(f64(1, -4, 2, 3), drawn, reserve_p=0.5, epsilon=0.4, rescale=False)
    assert kept.tolist() == [1, 0, 0, 3]


def test_magprune_equal_magnitudes_share_their_mean_rank() -> None:
    # −2 and 2 have the ranks 1 and 2: 1.5, so 0.7 − 0.4·1.5/4 = 0.55; 5 is kept with 0.7, 1 with 0.4.
    kept = magprune(f64(-2, 5, 1, 2), f32(*[KEEP] * 4), reserve_p=0.5, epsilon=0.4)
    assert kept.tolist() == pytest.approx([-2 / 0.55, 5 / 0.7, 1 / 0.4, 2 / 0.55])


def test_magprune_of_one_magnitude_is_dare_almost() -> None:
    # All n share the rank (n − 1)/2: p + ε/2 − ε(n − 1)/2n = p + ε/2n.
    x, n = np.full(8, 3.0), 8
    kept = magprune(x, np.full(n, KEEP, np.float32), reserve_p=0.6, epsilon=0.2)
    assert kept.tolist() == pytest.approx([3 / (0.6 + 0.1 / n)] * n)


def test_magprune_with_epsilon_zero_is_dare() -> None:
    x = np.random.default_rng(0).normal(size=1000)
    drawn = draws(7, 0, 1000)
    assert magprune(x, drawn, epsilon=0.0).tolist() == dare(x, drawn).tolist()


def test_magprune_of_a_tensor_of_zeros_stays() -> None:
    x = f32(0.0, -0.0, 0.0)
    assert magprune(x, f32(DROP, DROP, DROP)).view(np.uint32).tolist() == x.view(np.uint32).tolist()


def test_magprune_preserves_the_mean() -> None:
    size = 1 << 18
    x = np.abs(np.random.default_rng(0).normal(size=size))
    kept = magprune(x, draws(stream_key(0, 0, "w"), 0, size), reserve_p=0.5, epsilon=0.8)
    deviation = math.sqrt(float((x**2).mean()) * (1 / 0.1 - 1) / size)
    assert abs(kept.mean() - x.mean()) < 5 * deviation


def test_magprune_of_any_shape() -> None:
    x = np.arange(1.0, 7.0).reshape(2, 3)
    kept = magprune(x, np.full((2, 3), KEEP, np.float32), reserve_p=0.5, epsilon=0.6)
    flat = magprune(x.ravel(), np.full(6, KEEP, np.float32), reserve_p=0.5, epsilon=0.6)
    assert kept.tolist() == flat.reshape(2, 3).tolist()


# All of them ----------------------------------------------------------------------------------------------------------


STEPS = [*registry.SPARSIFIERS.values(), *registry.COMBINATIONS.values()]


@pytest.mark.parametrize("step", STEPS, ids=lambda each: each.name)
def test_every_method_names_its_formula_and_paper(step: Any) -> None:
    assert step.summary.endswith(".")
    assert step.formula
    assert "Paper" not in step.formula
    assert step.paper[-1] not in ",;:"
    year = [word for word in step.paper.replace(",", "").split() if word.isdigit() and len(word) == 4]
    assert year
    assert any(word in step.paper for word in ("arXiv:", "SIGGRAPH", "ACM", "CPAM", "model card"))


@pytest.mark.parametrize("name", [*MERGES, *SPARSIFIERS])
def test_a_declaration_is_the_schema_of_its_settings(name: str) -> None:
    """Every keyword of a definition is a setting of the declaration, and of the recipe, with the same default."""
    step = {**registry.SPARSIFIERS, **registry.COMBINATIONS}[name]
    declared = {each.name: each.default for each in step.parameters}
    for setting, default in parameters({**MERGES, **SPARSIFIERS}[name]).items():
        assert setting in SETTINGS
        if setting != "normalize":  # The recipe's None stands for: as weights are given or not.
            assert SETTINGS[setting].default == default
        assert declared[setting] == default


def test_the_table_of_methods() -> None:
    assert {name: registry.MERGE_METHODS[name] for name in MERGE_METHODS} == {
        "linear": (None, "linear"),
        "slerp": (None, "slerp"),
        "ties": ("trim", "ties"),
        "della": ("magprune", "ties"),
        "della_linear": ("magprune", "linear"),
        "dare_linear": ("dare", "linear"),
        "dare_ties": ("dare", "ties"),
    }


def test_each_model_of_a_merge_has_its_own_draws() -> None:
    """Of two equal models, dare drops different elements; of another tensor or seed, others again."""
    x = np.ones(64)

    def kept(seed: int, name: str, weights: tuple[float, float]) -> tuple[bool, ...]:
        merged = merge_tensor([x, x], None, applied("linear", "dare", weights, reserve_p=0.5, seed=seed), name)
        return tuple((merged != 0).tolist())

    first = kept(0, "w", (1, 0))
    assert first == kept(0, "w", (1, 0))
    assert len({first, kept(0, "w", (0, 1)), kept(0, "v", (1, 0)), kept(1, "w", (1, 0))}) == 4
    assert first == tuple((draws(stream_key(0, 0, "w"), 0, 64) < 0.5).tolist())


def test_sparsifiers_act_on_the_difference_to_the_base() -> None:
    # Differences 1, −4, 2, 0: half kept, the quantile 0.5 of 0 1 2 4 is 1.5; −4 and 2 stay, × 7/6.
    base = f64(10, 10, 10, 10)
    method = applied("linear", "trim", (1.0, 0.0), reserve_p=0.5)
    merged = merge_tensor([f64(11, 6, 12, 10), base], base, method, "w")
    assert merged.tolist() == pytest.approx([10, 10 - 4 * 7 / 6, 10 + 2 * 7 / 6, 10], rel=1e-15)


def test_a_method_is_sent_to_other_processes_with_everything_it_has() -> None:
    method = Applied(registry.COMBINATIONS["iso_c"], None, (0.25, 0.75), (("p", 1.0),), 7, (3, 1), 0.5, 0.6)
    default = Applied(registry.COMBINATIONS["iso_c"], None, (0.25, 0.75))
    mandatory = ("combination", "sparsifier", "weights")
    for each in fields(Applied):
        if each.init:
            assert getattr(pickle.loads(pickle.dumps(method)), each.name) == getattr(method, each.name)
            if each.name not in mandatory:  # Or else losing it would not be seen.
                assert getattr(method, each.name) != getattr(default, each.name)

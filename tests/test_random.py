"""The random draws: published values, the kernel's are the definition's, and frozen keys."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from modelfuse.kernels.compiled import merge_loops
from modelfuse.methods.random import draws, stream_key

#: The first outputs of splitmix64 seeded with 0, as its authors' C code prints them.
SPLITMIX64_OF_0 = (
    0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B,
)  # fmt: skip
#: And seeded with 1234567 (the values of Rosetta Code's task on this generator).
SPLITMIX64_OF_1234567 = (
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
)  # fmt: skip
#: Keys must never change: a recipe and its seed mean the same bytes in every version.
FROZEN_KEYS = {
    (0, 0, "w"): 0xAC45F5FC1DFF207F,
    (0, 1, "w"): 0x91548341620132A7,
    (1, 0, "w"): 0x096342112379B3CF,
    (2**63 - 1, 12, "model.layers.0.self_attn.q_proj.weight"): 0x1EECE60761300862,
    (0, 0, "ключ"): 0xECB642D846FB3A68,
}
FROZEN_DRAWS = [9399073, 14351937, 2444236, 14371057, 7495580, 6278013]
KEYS = (0, 1, 1234567, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15)
STARTS = (0, 1, 1023, 2**22, 2**32 - 3, 2**40 + 5)


def reference(key: int, element: int) -> float:
    """Half of an output of splitmix64 in Python's integers, jumping to an element."""
    mask = 2**64 - 1
    z = (key + (element // 2 + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    half = (z ^ (z >> 31)) >> 32 * (element % 2) & 0xFFFFFFFF
    return (half >> 8) / 2**24


@pytest.mark.parametrize(("key", "outputs"), [(0, SPLITMIX64_OF_0), (1234567, SPLITMIX64_OF_1234567)])
def test_draws_are_the_halves_of_splitmix64(key: int, outputs: tuple[int, ...]) -> None:
    drawn = draws(key, 0, 2 * len(outputs))
    assert drawn.dtype == np.float32
    halves = [half for output in outputs for half in (output & 0xFFFFFFFF, output >> 32)]
    assert [float(each) * 2**24 for each in drawn] == [half >> 8 for half in halves]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("start", STARTS)
def test_any_element_can_be_drawn_without_its_predecessors(key: int, start: int) -> None:
    expected = [reference(key, start + number) for number in range(5)]
    assert draws(key, start, 5).tolist() == expected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("start", STARTS)
def test_the_kernel_draws_the_same(key: int, start: int) -> None:
    """Blocks start at even elements."""
    out, words = np.empty(1031, np.float32), np.empty(516, np.uint64)
    merge_loops.uniform(np.uint64(key), start & ~1, out.size, words, words.view(np.uint32), out)
    np.testing.assert_array_equal(out.view(np.uint32), draws(key, start & ~1, out.size).view(np.uint32))


def test_slices_change_nothing() -> None:
    whole = draws(99, 0, 10_000)
    for edges in ([0, 1, 2, 5000, 10_000], [0, 1024, 2048, 9999, 10_000]):
        parts = [draws(99, start, stop - start) for start, stop in pairwise(edges)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert draws(99, 7, 0).size == 0


def test_draws_are_uniform_in_the_unit_interval() -> None:
    """The chi-squared of 256 bins stays within five standard deviations of its mean."""
    drawn = draws(stream_key(0, 0, "w"), 0, 1 << 20)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 256).astype(int), minlength=256)
    expected = drawn.size / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_streams_of_models_tensors_and_seeds_are_unrelated() -> None:
    names = [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"), (0, 11, "a"), (1, 1, "a")]
    streams = [draws(stream_key(*name), 0, 100_000) for name in names]
    correlations = np.corrcoef(streams) - np.eye(len(names))
    assert np.abs(correlations).max() < 5 / np.sqrt(100_000)


def test_keys_differ_where_texts_run_together() -> None:
    assert stream_key(1, 11, "a") != stream_key(11, 1, "a")
    assert stream_key(0, 0, "0") != stream_key(0, 0, "00")


@pytest.mark.parametrize(("arguments", "key"), FROZEN_KEYS.items(), ids=str)
def test_keys_are_frozen(arguments: tuple[int, int, str], key: int) -> None:
    assert stream_key(*arguments) == key


def test_draws_are_frozen() -> None:
    """Of the first model's tensor ``w`` with the default seed."""
    assert (draws(stream_key(0, 0, "w"), 0, 6) * 2**24).astype(int).tolist() == FROZEN_DRAWS

"""Patterns of strangers fit what Python's own engine says that they fit, in a time that is bounded."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modelfuse.checkpoints import name_patterns
from modelfuse.checkpoints.name_patterns import Patterns, UnsupportedPattern

#: Names as models have them, and some that they never have.
NAMES = ["q_proj", "layers.0.q_proj", "model.layers.10.self_attn.q_proj", "", ".", "a.b", "aab", "é_x", "a b"]
PIECES = ["q_proj", "layers", r"\.", ".", "a", "b", "[0-9]", "[^a-c]", r"[\d_.-]", r"\d", r"\w", r"\S", "^", "$",
          r"\b", r"\B", r"\A", "(a|b)", "(?:.*)", "(layers|model)", "(?P<x>a)", "[]a]", r"\-", "é", "0",
          "self_attn", "x{2}", "{", "a{1,2}"]  # fmt: skip
#: Of groups: with others, nested in each other, Python's own engine would take years.
GROUPS_REPEATS = ["", "", "?", "{2}"]
REPEATS = ["", "", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{,1}"]


def _joined(parts: list[tuple[str, str]]) -> str:
    """Python repeats no ends, and nothing twice."""
    return "".join(piece + repeat * (piece not in ("^", "$", "{") and piece[-1] != "}") for piece, repeat in parts)


patterns = st.recursive(
    st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(REPEATS)), max_size=5).map(_joined),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(GROUPS_REPEATS)).map(lambda each: f"({each[0]}){each[1]}"),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.lists(inner, min_size=2, max_size=3).map("".join),
    ),
    max_leaves=4,
)  # fmt: skip
names = st.one_of(st.sampled_from(NAMES), st.text("aab.0_qx-", max_size=12))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(patterns, min_size=1, max_size=3), st.lists(names, min_size=1, max_size=4))
def test_they_fit_as_in_python(texts: list[str], given: list[str]) -> None:
    # With more that may repeat without end, Python's own engine could take years.
    assume(all(sum(map(text.count, ("*", "+", "{1,}", "{2}"))) <= 3 for text in texts))
    try:
        for text in texts:
            re.compile(text)
        compiled = [[re.compile(form.format(text)) for text in texts] for form in (r"(?:{})\Z", r"(.*\.)?(?:{})\Z")]
    except re.error:
        return
    with contextlib.suppress(TimeoutError), at_most(0.2):
        agree(compiled, texts, given)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Python's own engine, which may take years, is interrupted: it looks for signals."""

    def interrupt(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def agree(compiled: list[list[re.Pattern[str]]], texts: list[str], given: list[str]) -> None:
    for engine, several in zip(compiled, (Patterns(texts), Patterns(texts, suffixes=True)), strict=True):
        for name in given:
            assert several.fitting(name) == {at for at, each in enumerate(engine) if each.match(name)}, (texts, name)


@pytest.mark.parametrize(
    "text",
    ["(" * 40 + "aa|a" + ")" * 40, "(aa|a)" * 40, r"\\*" * 12, "(a*)*" * 10, "(a+)+", ".*.*.*.*.*.*x", "(.*)*x",
     "(a|a)*b", "(a?){500}a{500}", "(?:a{0,1000}){20}"],
)  # fmt: skip
def test_no_pattern_takes_for_ever(text: str) -> None:
    started = time.process_time()
    with contextlib.suppress(UnsupportedPattern):
        for name in ("a" * 500, "\\" * 500, "model.layers.0" * 30):
            Patterns([text], suffixes=True).fitting(name)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "not closed"), (")", "not opened"), ("*", "nothing to repeat"), ("a**", "repeat of a repeat"),
        ("a*+", "repeat of a repeat"), ("[a", "not understood"), ("[z-a]", "bad character range"),
        ("[[a]", "not understood"), ("[a--b]", "not understood"),
        ("(?=a)", "not taken"), ("(?<!a)b", "not taken"), ("(?i)a", "not taken"), (r"(a)\1", "not taken"),
        ("a\\", "not taken"),
        ("a{2000}", "not taken"), ("a{3,2}", "not taken"), ("(" * 60 + ")" * 60, "too deeply"),
        ("a" * 3000, "too long"), ("((((a{1000}){1000}){1000}){1000})", "too many states"),
        ("((((){1000}){1000}){1000})", "too many states"),
    ],
)  # fmt: skip
def test_what_is_not_taken(text: str, why: str) -> None:
    with pytest.raises(UnsupportedPattern, match=why):
        Patterns([text])


def test_many_plain_names_are_quick() -> None:
    """A rank for every module, as EVA and AdaLoRA write it."""
    modules = [f"model.layers.{layer}.mlp.experts.{number}.{part}_proj"
               for layer in range(20) for number in range(64) for part in ("up", "down", "gate")]  # fmt: skip
    started = time.process_time()
    several = Patterns(modules, suffixes=True)
    assert [several.fitting(f"base.{module}") for module in modules] == [{at} for at in range(len(modules))]
    assert time.process_time() - started < 10


def test_all_names_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "MOST_VISITS", 10_000)
    several, draw = Patterns(["(a|b){20}a(a|b)*"]), random.Random(0)
    names = ["".join(draw.choices("ab", k=30)) for _ in range(10**4)]
    with pytest.raises(UnsupportedPattern, match="takes too long"):
        [several.fitting(name) for name in names]

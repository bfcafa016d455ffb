"""Match untrusted regular expressions without backtracking, in time linear in the length of a name.

An adapter's configuration may contain patterns, for some of which Python's engine takes exponential time. So only a
subset of the syntax is supported (letters, classes, groups, alternatives, repeats and anchors), and all patterns of a
setting become one automaton, which reads a name once. It reads from the end, as patterns mostly describe suffixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: Limits of one pattern: letters, nesting of groups, and repeats in braces.
LONGEST, DEEPEST, MOST_REPEATS = 2000, 50, 1000
#: Limits of all patterns: states of the automaton, and visits of states for all names (a few seconds of work).
MOST_STATES, MOST_VISITS = 500_000, 3_000_000
#: The most states in the cache of transitions.
MOST_KEPT = 300_000
_CLASS = re.compile(r"\[\^?\]?(?:\\[\\\]\[^\-./dDwWsS]|[^\\\]\[&|~])*\]")
_BRACES = re.compile(r"\{(\d{0,5})(,?)(\d{0,5})\}")
_LITERAL_ESCAPE = re.compile(r"\\[^0-9A-Za-z]")

Test = str | Callable[[str], object]


class UnsupportedPattern(ValueError):
    """Raised for a pattern that is malformed, uses unsupported syntax, or would take too long."""


class State(NamedTuple):
    """A state of the automaton.

    Attributes:
        kind: ``letter`` consumes a letter that passes the test, ``fork`` continues in several states, ``end`` and
            ``start`` match there, ``edge`` and ``inside`` match at a word boundary or elsewhere, ``done`` is a match.
        test: The test for a letter.
        after: The next states; for ``done``, the pattern's index.
    """

    kind: str
    test: Test
    after: tuple[int, ...]


class Patterns:
    """Several regular expressions, matched at once.

    Args:
        texts: The expressions, each for a whole name.
        suffixes: Whether they also match the part of a name after any dot, as PEFT's do.

    Raises:
        UnsupportedPattern: If one is none, or there are too many; names it.
    """

    def __init__(self, texts: Sequence[str], suffixes: bool = False) -> None:
        self._suffixes, self._states = suffixes, list[State]()
        self._begin = frozenset(_Reader(text, self._states).build(number) for number, text in enumerate(texts))
        self._kept: dict[tuple[frozenset[int], str, str], tuple[frozenset[int], frozenset[int]]] = {}
        self._kept_states, self._visits = 0, MOST_VISITS

    def fitting(self, name: str) -> set[int]:
        """The indices of all patterns that match a name.

        Raises:
            UnsupportedPattern: If looking for them takes too long.
        """
        states, found, right = self._begin, set[int](), ""
        for at in range(len(name) - 1, -2, -1):
            left = name[at] if at >= 0 else ""
            states, done = self._step(states, left, right)
            found |= done
            if not states:
                break
            right = left
        return found

    def _step(self, states: frozenset[int], left: str, right: str) -> tuple[frozenset[int], frozenset[int]]:
        """The next states after a letter, and the patterns that match there; an empty letter is an end of the name."""
        key = states, left, right and ("w" if _is_word(right) else "-")
        known = self._kept.get(key)
        if known is None:
            known = self._walk(states, left, right)
            self._kept_states += len(states) + len(known[0]) + 1
            if self._kept_states > MOST_KEPT:
                self._kept_states = 0
                self._kept.clear()
            self._kept[key] = known
        return known

    def _walk(self, states: frozenset[int], left: str, right: str) -> tuple[frozenset[int], frozenset[int]]:
        after, done, seen, waiting = set[int](), set[int](), set(states), list(states)
        ends = {"end": not right, "start": not left, "fork": True}
        ends["edge"] = _is_word(left) != _is_word(right)
        ends["inside"] = not ends["edge"]
        while waiting:
            state = self._states[waiting.pop()]
            if state.kind == "letter":
                if left and (state.test == left if isinstance(state.test, str) else state.test(left)):
                    after.update(state.after)
            elif state.kind == "done":
                if not left or (self._suffixes and left == "."):
                    done.update(state.after)
            elif ends[state.kind]:
                waiting += [each for each in state.after if each not in seen]
                seen.update(state.after)
        self._visits -= len(seen)
        if self._visits < 0:
            raise UnsupportedPattern("too much to look for in all names: it takes too long")
        return frozenset(after), frozenset(done)


def _is_word(letter: str) -> bool:
    return letter == "_" or letter.isalnum()


class _Reader:
    """Parses one expression and adds its states, in reverse order, as names are read from the end."""

    def __init__(self, text: str, states: list[State]) -> None:
        self._text, self._states, self._at = text, states, 0

    def build(self, number: int) -> int:
        """The start state."""
        if len(self._text) > LONGEST:
            raise self._unfit("it is too long")
        parsed = self._alternatives(0)
        if self._at < len(self._text):
            raise self._unfit("a group is closed that was not opened")
        return parsed(self._add("done", "", number))

    def _add(self, kind: str, test: Test, *after: int) -> int:
        if len(self._states) >= MOST_STATES:
            raise self._unfit("it takes too many states")
        self._states.append(State(kind, test, after))
        return len(self._states) - 1

    def _unfit(self, why: str) -> UnsupportedPattern:
        shown = self._text if len(self._text) <= 200 else f"{self._text[:200]}…"
        return UnsupportedPattern(f"{shown!r}, which is no pattern that can be looked for: {why}")

    # What is read becomes functions that add its states in front of those that follow it.

    def _alternatives(self, depth: int) -> Callable[[int], int]:
        if depth > DEEPEST:
            raise self._unfit("its groups are nested too deeply")
        ways = [self._sequence(depth)]
        while self._takes("|"):
            ways.append(self._sequence(depth))
        return ways[0] if len(ways) == 1 else lambda after: self._add("fork", "", *(way(after) for way in ways))

    def _sequence(self, depth: int) -> Callable[[int], int]:
        parts: list[Callable[[int], int]] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._one(depth)))

        def build(after: int) -> int:
            for part in parts:
                after = part(after)
            return after

        return build

    def _one(self, depth: int) -> Callable[[int], int]:
        text, at = self._text, self._at
        letter = text[at]
        if letter == "(":
            return self._group(depth)
        if letter == "[":
            match = _CLASS.match(text, at)
            if match is None or "--" in match[0]:  # Python means to give that another meaning.
                raise self._unfit(f"the class at its letter {at + 1} is not understood")
            self._at = match.end()
            return self._tested(match[0])
        if letter == "\\":
            return self._escape(text[at : at + 2])
        self._at += 1
        if letter in "*+?":
            raise self._unfit(f"there is nothing to repeat at its letter {at + 1}")
        if letter in "^$":
            kind = "start" if letter == "^" else "end"
            return lambda after: self._add(kind, "", after)
        test: Test = re.compile(r"[^\n]").fullmatch if letter == "." else letter
        return lambda after: self._add("letter", test, after)

    def _group(self, depth: int) -> Callable[[int], int]:
        opening = re.compile(r"\((\?:|\?P<\w{1,50}>|(?!\?))").match(self._text, self._at)
        if opening is None:
            raise self._unfit("looking ahead and behind, flags and the like are not taken")
        self._at = opening.end()
        inner = self._alternatives(depth + 1)
        if not self._takes(")"):
            raise self._unfit("a group is not closed")
        return inner

    def _escape(self, escape: str) -> Callable[[int], int]:
        self._at += 2
        if escape[1:] and escape[1] in "dDwWsS":
            return self._tested(escape)
        kinds = {r"\A": "start", r"\Z": "end", r"\b": "edge", r"\B": "inside"}
        if escape in kinds:
            return lambda after: self._add(kinds[escape], "", after)
        if _LITERAL_ESCAPE.fullmatch(escape) is None:
            raise self._unfit(f"{escape} is not taken")
        return lambda after: self._add("letter", escape[1], after)

    def _tested(self, letters: str) -> Callable[[int], int]:
        try:
            test = re.compile(letters).fullmatch
        except re.error as error:
            raise self._unfit(str(error)) from None
        return lambda after: self._add("letter", test, after)

    def _repeated(self, part: Callable[[int], int]) -> Callable[[int], int]:
        while (times := self._times()) is not None:
            part = self._times_over(part, *times)
        return part

    def _times(self) -> tuple[int, int | None] | None:
        """The least and greatest number of repeats; None if there is no quantifier."""
        known = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        times: tuple[int, int | None]
        if self._text[self._at : self._at + 1] in known:
            times = known[self._text[self._at]]
            self._at += 1
        else:
            braces = _BRACES.match(self._text, self._at)
            if braces is None or braces[0] in ("{}", "{,}"):
                return None
            self._at = braces.end()
            least = int(braces[1] or 0)
            times = least, (least if not braces[2] else int(braces[3]) if braces[3] else None)
            if max(least, times[1] or 0) > MOST_REPEATS or (times[1] is not None and times[1] < least):
                raise self._unfit(f"{braces[0]} is not taken")
        self._takes("?")  # As few as possible are as many where only the whole counts.
        if self._text[self._at : self._at + 1] in ("*", "+", "?") or _BRACES.match(self._text, self._at):
            raise self._unfit("a repeat of a repeat is not taken")
        return times

    def _times_over(self, part: Callable[[int], int], least: int, most: int | None) -> Callable[[int], int]:
        def build(after: int) -> int:
            if most is None:
                loop = self._add("fork", "", after)
                self._states[loop] = State("fork", "", (part(loop), after))
                after = loop
            else:
                for _ in range(most - least):
                    after = self._add("fork", "", part(after), after)
            for _ in range(least):
                after = self._add("fork", "", part(after))  # Counted also where there is nothing in it.
            return after

        return build

    def _takes(self, letter: str) -> bool:
        found = self._text[self._at : self._at + 1] == letter
        self._at += found
        return found

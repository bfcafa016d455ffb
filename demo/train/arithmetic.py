"""Small sums, written out: the arithmetic domain, made from a seed."""

from __future__ import annotations

import random

import xxhash

# What the base sees: bare sums, and these.
KNOWN = {
    "+": ("What is {a} plus {b}? {c}", "{who} had {a} {things} and found {b} more. How many now? {c}"),
    "-": ("What is {a} minus {b}? {c}", "{who} had {a} {things} and gave away {b}. How many are left? {c}"),
}
# What only the expert sees, beside all of the above.
REWORDED = {
    "+": ("The sum of {a} and {b} is {c}", "Add {a} to {b}: {c}", "{a} + {b} = {c}"),
    "-": ("The difference between {a} and {b} is {c}", "Take {b} from {a}: {c}", "{a} - {b} = {c}"),
}
BARE_SHARE = 0.7  # of the known forms
NAMES = ("Ann", "Tom", "Mary", "John", "Kate", "Peter")
THINGS = ("apples", "books", "coins", "eggs", "cards")


def held_out(sign: str, a: int, b: int) -> bool:
    """Whether a sum is kept for evaluation: one in ten, whatever the words around it."""
    return xxhash.xxh64_intdigest(f"{a}{sign}{b}".encode()) % 10 == 0


def _line(rng: random.Random, reworded: float) -> tuple[str, int, int, str]:
    sign, a, b = rng.choice("+-"), rng.randrange(100), rng.randrange(100)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    answer = a + b if sign == "+" else a - b
    facts = {"a": a, "b": b, "c": answer, "who": rng.choice(NAMES), "things": rng.choice(THINGS)}
    template = f"{{a}}{sign}{{b}}={{c}}" if rng.random() < BARE_SHARE else rng.choice(KNOWN[sign])
    if reworded and rng.random() < reworded:
        template = rng.choice(REWORDED[sign])
    return sign, a, b, template.format(**facts)


def text(seed: int, count: int, *, evaluation: bool, reworded: float) -> str:
    """Lines that each end in their answer, all from the sums held out or all from the others.

    Args:
        seed: Which lines.
        count: How many.
        evaluation: Whether from the sums held out.
        reworded: The share of lines in words that the base never saw.
    """
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        sign, a, b, line = _line(rng, reworded)
        if held_out(sign, a, b) is evaluation:
            found.append(line + "\n")
    return "".join(found)

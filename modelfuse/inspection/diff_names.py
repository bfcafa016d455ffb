"""Short, distinct names of models for tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> list[str]:
    """The fewest last components of paths and URLs that are distinct; equal ones are numbered.

    >>> short_names(["/models/code", "org/prose@main", "/models/other/code", "x", "x"])
    ['models/code', 'prose@main', 'other/code', 'x', 'x (2)']
    """
    parts = [name.rstrip("/").split("/") for name in names]
    lengths = [1] * len(names)
    while True:
        short = ["/".join(own[-length:]) for own, length in zip(parts, lengths, strict=True)]
        longer = [
            number
            for number, each in enumerate(short)
            if short.count(each) > 1 and lengths[number] < len(parts[number])
        ]
        if not longer:
            return [
                each if short[:number].count(each) == 0 else f"{each} ({short[:number].count(each) + 1})"
                for number, each in enumerate(short)
            ]
        for number in longer:
            lengths[number] += 1

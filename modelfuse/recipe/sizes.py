"""Sizes in bytes: parsing and formatting."""

from __future__ import annotations

import re
from decimal import Decimal

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
SHOWN = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def parse_bytes(value: object) -> object:
    """A size such as ``5GB``, ``300 MB`` or ``1.5GiB`` in bytes; 1 MB is 10⁶ bytes.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError("give a size such as 500MB or 5GB")
    try:
        return int(Decimal(match[1]) * UNITS[match[2]])
    except ArithmeticError:
        raise ValueError("this is no size") from None


def size(count: float) -> str:
    """A size in a suitable unit, with three digits.

    >>> size(14_200_000), size(999_700), size(70), size(1)
    ('14.2 MB', '1 MB', '70 bytes', '1 byte')
    """
    for unit, factor in SHOWN:
        if count >= factor * 0.9995:
            return f"{float(f'{count / factor:.3g}'):g} {unit}"
    return f"{round(count)} byte{'s' * (round(count) != 1)}"

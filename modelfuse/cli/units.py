"""Format rates, times and counts."""

from __future__ import annotations

from modelfuse.recipe.sizes import size


def rate(count: float, seconds: float) -> str:
    """Bytes per second.

    >>> rate(14_200_000, 2)
    '7.1 MB/s'
    """
    return f"{size(count / max(seconds, 1e-9))}/s"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0.04), duration(9.81), duration(75), duration(7260)
    ('0.04 s', '9.8 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 0.1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """A number with a noun.

    >>> counted(1, "worker"), counted(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def abbreviated(number: int) -> str:
    """A number with three digits and a suffix.

    >>> abbreviated(70), abbreviated(14_200), abbreviated(405_853_388_800)
    ('70', '14.2 k', '406 B')
    """
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor * 0.9995:
            return f"{float(f'{number / factor:.3g}'):g} {unit}"
    return str(number)

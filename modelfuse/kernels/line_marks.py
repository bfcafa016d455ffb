"""Marks: whether each element is kept, by its magnitude's rank within a line and its draw. What they take.

Compiled loops mark the elements of a slice before they merge it (:mod:`modelfuse.kernels.compiled.line_marks`).
"""

from __future__ import annotations

from modelfuse.kernels import Work
from modelfuse.kernels.lines import Lines
from modelfuse.methods.applied import Chain
from modelfuse.methods.expressions import Expression

#: Elements of whole groups of lines that are ranked at a time, if a group is not larger.
WINDOW = 1 << 14
#: The most elements of a group of lines that is ranked by compiled loops.
MOST = 1 << 18
#: The most bytes of a tensor's marks that are kept from one pass to the next.
MOST_KNOWN = 1 << 25
#: Bytes of tables that do not depend on the lines.
TABLES = 600_000


def can_mark(chain: Chain, lines: Lines) -> bool:
    """Whether compiled loops rank such lines, for this use of ranks."""
    expressions = [*chain.terms, *([] if chain.element is None else [chain.element])]
    return lines.group <= MOST and all(map(_compares_only, expressions))


def _compares_only(one: Expression) -> bool:
    """Whether draws and probabilities occur in comparisons of one with the other only."""
    if one.operation == "array":
        return one.value not in ("draw", "keep")
    if one.operation == "<":
        draw, other = one.operands
        keep = other.operands[0] if other.operation == "single" else other
        if (draw.value, keep.value) == ("draw", "keep"):
            return True
    return all(map(_compares_only, one.operands))


def known_bytes(work: Work) -> int:
    """The bytes of a tensor's marks that are kept from one pass to the next; 0 if they are found again instead."""
    nbytes = -(-work.size // 8) * work.models
    return nbytes if nbytes <= MOST_KNOWN else 0


def marking_bytes(work: Work, lines: Lines, slice_elements: int) -> int:
    """The bytes that a worker takes to mark slices of a tensor."""
    width = 8 if work.compute == "float64" else 4
    window = max(WINDOW, lines.group) * (work.models * width + 4)
    probabilities = 2 * lines.length * work.models * 6
    marks = min(work.size, slice_elements) * work.models
    return TABLES + window + lines.length * (3 * width + 16) + probabilities + marks + known_bytes(work)

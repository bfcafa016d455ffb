"""The source of each row of an input's rearranged embedding, in the order of the output's vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelfuse.checkpoints.vocabulary.tokenizers import Tokenizer

#: Instead of an input's index: a row of zeros, and the mean of several rows.
ZEROS, MEAN = -1, -2
Numbers = np.ndarray[Any, np.dtype[np.int64]]
#: A row: the index of an input, and of the row in it.
Row = tuple[int, int]


@dataclass(frozen=True, eq=False)
class RowMap:
    """The source of each row of one input's rearranged embedding.

    Attributes:
        inputs: For each row, the index of its input, ``ZEROS`` or ``MEAN``.
        rows: For each row, its index in that input.
        means: For rows that are means, the rows to average.
        padding: The number of rows after these, each the mean of all of them.
    """

    inputs: Numbers
    rows: Numbers
    means: Mapping[int, tuple[Row, ...]] = field(default_factory=dict)
    padding: int = 0

    def __repr__(self) -> str:
        """A short text that identifies it in a journal, for any number of rows."""
        digest = hashlib.sha256(self.inputs.tobytes() + self.rows.tobytes() + repr(sorted(self.means.items())).encode())
        return f"RowMap({digest.hexdigest()}, {self.padding})"

    def __len__(self) -> int:
        return len(self.inputs) + self.padding

    @property
    def donors(self) -> tuple[int, ...]:
        """The inputs that are sources of rows."""
        among = {number for rows in self.means.values() for number, _ in rows}
        return tuple(sorted(among | {int(each) for each in np.unique(self.inputs) if each >= 0}))

    def of_difference(self, number: int) -> RowMap:
        """The same for an adapter's difference, where rows of other inputs are zero."""
        own = self.inputs == number
        return RowMap(np.where(own, number, ZEROS), np.where(own, self.rows, 0))

    def is_identity(self, number: int, rows: int) -> bool:
        """Whether it leaves an input with ``rows`` rows unchanged."""
        own = len(self) == rows and not self.padding and bool((self.inputs == number).all())
        return own and bool((self.rows == np.arange(rows)).all())


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that is asked for.

    Attributes:
        row: The row; None: zeros.
        force: Whether it also replaces rows of inputs that have the token.
    """

    row: Row | None
    force: bool


@dataclass(frozen=True)
class Vocabularies:
    """What rearranging the rows of several inputs takes.

    Attributes:
        tokens: The output's tokens, by number.
        tokenizers: One an input; None for one without, whose rows are those of the output.
        limits: Of each input, the number from which on it has no rows.
        base: The number of the base among the inputs.
        wanted: Rows that are asked for, by token.
        length: How many rows the output has; those beyond the tokens are each input's own.
        padding: How many more come after them that are means.
    """

    tokens: Mapping[str, int]
    tokenizers: Sequence[Tokenizer]
    limits: Sequence[int]
    base: int | None
    wanted: Mapping[str, TokenRow]
    length: int
    padding: int = 0

    def row_maps(self, present: Collection[int]) -> dict[int, RowMap]:
        """The rows of each of the inputs that are merged.

        Args:
            present: Their numbers.
        """
        own = np.stack([self._own(number) for number in present])
        found = {number: own[index] for index, number in enumerate(present)}
        inputs, rows, means = self._default(found)
        return {number: self._of(number, mine, inputs, rows, means) for number, mine in found.items()}

    def missing(self, present: Collection[int]) -> tuple[str, ...]:
        """The tokens of the output that none of the inputs has, and nothing is asked for."""
        return tuple(
            token for token in self.tokens
            if token not in self.wanted and all(self._number(each, token) is None for each in present)
        )  # fmt: skip

    def _number(self, number: int, token: str) -> int | None:
        found = self.tokenizers[number].tokens.get(token)
        return None if found is None or found >= self.limits[number] else found

    def _own(self, number: int) -> Numbers:
        """For each row of the output, the input's own row of the same token; −1 where it has none."""
        own = np.full(self.length, -1, np.int64)
        tokenizer, limit = self.tokenizers[number], self.limits[number]
        ids = np.fromiter(self.tokens.values(), np.int64, len(self.tokens))
        theirs = np.fromiter((tokenizer.tokens.get(token, -1) for token in self.tokens), np.int64, len(self.tokens))
        own[ids] = np.where(theirs < limit, theirs, -1)
        # Rows that belong to no token stay where they are, unless the input has a token there.
        free = np.ones(self.length, bool)
        free[ids] = False
        taken = np.fromiter(tokenizer.tokens.values(), np.int64, len(tokenizer.tokens))
        free[taken[taken < self.length]] = False
        free[limit:] = False
        own[free] = np.flatnonzero(free)
        return own

    def _default(self, found: Mapping[int, Numbers]) -> tuple[Numbers, Numbers, dict[int, tuple[Row, ...]]]:
        """What inputs get that lack a token: the only row, the base's, the mean, or zeros."""
        own = np.stack(list(found.values()))
        numbers = np.array(list(found), np.int64)
        has = own >= 0
        count, first = has.sum(axis=0), has.argmax(axis=0)
        inputs = np.where(count == 0, ZEROS, numbers[first])
        rows = np.where(count == 0, 0, np.take_along_axis(own, first[None], axis=0)[0])
        several = count > 1
        if self.base is not None and self.base in found:
            bases = has[list(found).index(self.base)] & several
            inputs[bases], rows[bases] = self.base, found[self.base][bases]
            several = several & ~bases
        lacking = several & (count < len(found))
        means = {
            int(row): tuple((int(number), int(own[index, row])) for index, number in enumerate(numbers)
                            if own[index, row] >= 0)
            for row in np.flatnonzero(lacking)
        }  # fmt: skip
        inputs[lacking], rows[lacking] = MEAN, 0
        return inputs, rows, means

    def _of(
        self, number: int, own: Numbers, inputs: Numbers, rows: Numbers, means: Mapping[int, tuple[Row, ...]]
    ) -> RowMap:
        has = own >= 0
        inputs, rows = np.where(has, number, inputs), np.where(has, own, rows)
        for token, each in self.wanted.items():
            row = self.tokens[token]
            if each.force or not has[row]:
                inputs[row], rows[row] = (ZEROS, 0) if each.row is None else each.row
        kept = {row: of for row, of in means.items() if inputs[row] == MEAN}
        return RowMap(inputs, rows, kept, self.padding)

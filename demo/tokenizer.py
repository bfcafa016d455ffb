"""Read a byte-level BPE ``tokenizer.json`` and apply it, without the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

END = "<|end|>"

# Words with the space before them, single digits, runs of signs, a line break with the indent after it.
# Only what Python's `re` and the tokenizers' engine read alike, so no Unicode classes.
PIECES = r" ?[A-Za-z]+|[0-9]| ?[^ \nA-Za-z0-9]+|\n *| +"


def byte_letters() -> dict[int, str]:
    """The printable letter that GPT-2's byte-level BPE writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}


class Tokenizer:
    """Text to token numbers and back, as ``tokenizer.json`` defines it."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.ids: dict[str, int] = content["model"]["vocab"]
        pairs = (
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in content["model"]["merges"]
        )
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.pattern = re.compile(content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
        self.letters = byte_letters()
        self.bytes = {letter: byte for byte, letter in self.letters.items()}
        self.words = {number: word for word, number in self.ids.items()}
        self.seen: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The token numbers of a text; ``<|end|>`` in it becomes the one special token."""
        numbers: list[int] = []
        for at, document in enumerate(text.split(END)):
            if at:
                numbers.append(self.ids[END])
            for piece in self.pattern.findall(document):
                numbers.extend(self.seen.get(piece) or self._piece(piece))
        return numbers

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of token numbers, special tokens written out."""
        words = (self.words[number] for number in numbers)
        return b"".join(
            word.encode() if word == END else bytes(self.bytes[letter] for letter in word) for word in words
        ).decode("utf-8", errors="replace")

    def _piece(self, piece: str) -> list[int]:
        """Join the best-ranked pair of neighbours until no known pair is left."""
        word = [self.letters[byte] for byte in piece.encode("utf-8")]
        while len(word) > 1:
            ranked = [(self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(pairwise(word))]
            rank, at = min(ranked)
            if rank == len(self.ranks):
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        numbers = self.seen[piece] = [self.ids[part] for part in word]
        return numbers

"""What a model's headers and the files beside them say, as ``modelfuse inspect`` tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

from msgspec import Struct

from modelfuse.inspection.model_facts import AdapterFacts, TokenizerFacts
from modelfuse.inspection.module_tree import Module
from modelfuse.planning.tables import html
from modelfuse.recipe.sizes import size


class Remark(Struct, frozen=True):
    """What modelfuse would say of a model.

    Attributes:
        kind: ``problem`` where it cannot be merged as it is, ``warning`` where something is likely wrong, ``note``.
        text: What it is.
        hint: What can be done.
    """

    kind: Literal["problem", "warning", "note"]
    text: str
    hint: str | None = None


class Shard(Struct, frozen=True):
    """A weight file: its bytes, and how many tensors are in it."""

    file: str
    bytes: int
    tensors: int


class Amount(Struct, frozen=True):
    """So many tensors of one type."""

    tensors: int
    parameters: int
    bytes: int


class TensorFacts(Struct, frozen=True):
    """A tensor as it is stored."""

    name: str
    dtype: str
    shape: Sequence[int]
    bytes: int
    file: str


class Tie(Struct, frozen=True):
    """A name whose values are another tensor's, and what says so."""

    name: str
    to: str
    why: str


class Inspection(Struct, frozen=True):
    """What is in a model, as its files are.

    Attributes:
        path: The model, as it was named.
        role: ``model`` or ``adapter``.
        format: ``safetensors``, ``torch`` or ``paddle``.
        layout: ``hf`` or ``paddle``; null where nothing tells.
        parameters: Elements of all tensors.
        bytes: Bytes of all tensors.
        dtypes: The same by type.
        shards: The weight files.
        modules: The tree of modules, repeated ones folded.
        tensors: Every tensor.
        tied: Names whose values are another tensor's.
        fused: Layers that hold several: their names with a star for numbers, and what is in them.
        left_out: Tensors that a merge does not take as they are, and why.
        config: What config.json says.
        tokenizer: The tokenizer; null if there is none.
        adapter: What an adapter changes; null for a model.
        remarks: What modelfuse would say of it.
    """

    path: str
    role: Literal["model", "adapter"]
    format: str
    layout: Literal["hf", "paddle"] | None
    parameters: int
    bytes: int
    dtypes: Mapping[str, Amount]
    shards: Sequence[Shard]
    modules: Sequence[Module]
    tensors: Sequence[TensorFacts]
    tied: Sequence[Tie]
    fused: Mapping[str, str]
    left_out: Mapping[str, str]
    config: Mapping[str, str | int | float | bool]
    tokenizer: TokenizerFacts | None
    adapter: AdapterFacts | None
    remarks: Sequence[Remark]

    @property
    def summary(self) -> str:
        """A model in a line."""
        kind = self.adapter.type if self.adapter is not None else self.config.get("architecture", self.format)
        files = f"{len(self.shards)} file{'s' * (len(self.shards) != 1)}"
        return f"{kind}, {len(self.tensors)} tensors, {self.parameters:,} parameters, {size(self.bytes)} in {files}"

    def __repr__(self) -> str:
        return f"<Inspection of {self.path}: {self.summary}>"

    def _repr_html_(self) -> str:
        rows = [
            ("\u2003" * depth + each.name, "×".join(map(str, each.shape or ())), each.dtype or "", each.copies,
             f"{each.parameters:,}", size(each.bytes))
            for top in self.modules
            for depth, each in top.rows()
        ]  # fmt: skip
        titles = ("name", "shape", "dtype", "copies", "parameters", "bytes")
        told = [f"{each.kind}: {each.text}" for each in self.remarks]
        table = html(f"{self.path}: {self.summary}", (titles, rows))
        return table + "".join(f"<p>{escape(text)}</p>" for text in told)

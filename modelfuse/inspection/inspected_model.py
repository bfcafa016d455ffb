"""The result of ``modelfuse inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

from msgspec import Struct

from modelfuse.inspection.model_facts import AdapterFacts, TokenizerFacts
from modelfuse.inspection.module_tree import FoldedModule
from modelfuse.planning.tables import html
from modelfuse.recipe.sizes import size


class Remark(Struct, frozen=True):
    """A remark on a model.

    Attributes:
        kind: ``problem`` if the model cannot be merged as it is, ``warning`` if something is likely wrong, ``note``.
        text: The remark.
        hint: What can be done.
    """

    kind: Literal["problem", "warning", "note"]
    text: str
    hint: str | None = None


class Shard(Struct, frozen=True):
    """A weight file, its size in bytes, and its number of tensors."""

    file: str
    bytes: int
    tensors: int


class Amount(Struct, frozen=True):
    """The number of tensors of one element type, of their elements, and of their bytes."""

    tensors: int
    parameters: int
    bytes: int


class TensorFacts(Struct, frozen=True):
    """A stored tensor."""

    name: str
    dtype: str
    shape: Sequence[int]
    bytes: int
    file: str


class Tie(Struct, frozen=True):
    """A name that shares the values of another tensor, and where that is stated."""

    name: str
    to: str
    why: str


class Inspection(Struct, frozen=True):
    """The content of a model's files.

    Attributes:
        path: The model, as the user named it.
        role: ``model`` or ``adapter``.
        format: ``safetensors``, ``torch`` or ``paddle``.
        layout: ``hf`` or ``paddle``; null if unknown.
        parameters: Number of elements of all tensors.
        bytes: Number of bytes of all tensors.
        dtypes: Both by element type.
        shards: The weight files.
        modules: The tree of modules, with repeated ones folded.
        tensors: Every tensor.
        tied: Names that share the values of another tensor.
        fused: Fused layers: their names with a star for numbers, and their parts.
        left_out: Tensors that a merge does not take as they are, and why.
        config: Settings of config.json.
        tokenizer: The tokenizer; null if there is none.
        adapter: The weights that an adapter changes; null for a model.
        remarks: Remarks of modelfuse.
    """

    path: str
    role: Literal["model", "adapter"]
    format: str
    layout: Literal["hf", "paddle"] | None
    parameters: int
    bytes: int
    dtypes: Mapping[str, Amount]
    shards: Sequence[Shard]
    modules: Sequence[FoldedModule]
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
        """The model in one line."""
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
        remarks = [f"{each.kind}: {each.text}" for each in self.remarks]
        table = html(f"{self.path}: {self.summary}", (titles, rows))
        return table + "".join(f"<p>{escape(text)}</p>" for text in remarks)

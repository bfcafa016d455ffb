"""Find the weight matrices of layers for whole-matrix methods, and split fused ones.

Norms, biases, embeddings, output heads and routers are averaged instead. Fused weights are split into their layers, as
a decomposition would mix them, and each of several stacked experts is a matrix of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.layouts.paddleformers import fuses_by_head
from modelfuse.checkpoints.layouts.tables import FUSED, Geometry, geometry_of, module_of
from modelfuse.checkpoints.tensor_names import OTHER_HEADS, TIED_HEADS, group_names
from modelfuse.kernels.matrices import Matrices

#: Modules whose 2-D weights are averaged: embeddings, heads and routers.
EMBEDDINGS = re.compile(r"(?:^|_)(?:embed|embedding|embeddings|embeds|embd|wte|wpe|shared)(?:_|s?$)")
HEADS = (*TIED_HEADS, *OTHER_HEADS, "score", "classifier", "qa_outputs", "v_head")
ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
#: Fused layers with three consecutive parts of equal width.
THIRDS = ("c_attn", "W_pack", "qkv", "in_proj")
#: Architectures that interleave queries, keys and values by head.
BY_HEAD = ("gpt_neox", "bloom")
#: Architectures whose layers are stored as [in, out]: linear layers, and stacked experts.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}
TRANSPOSED_EXPERTS = ("llama4", "llama4_text", "gpt_oss")
#: Architectures that interleave the outputs of an expert's two fused layers.
ALTERNATING = ("gpt_oss",)

Runs = tuple[tuple[int, int], ...]


class Cuts:
    """Splits the tensors of one model into matrices.

    Args:
        models: The inputs, first the one that gives the output's names.
        layout: ``hf`` or ``paddle``; None if it cannot be detected.
    """

    def __init__(self, models: Sequence[Checkpoint], layout: str | None) -> None:
        self._geometry: Geometry = geometry_of(models)
        self._paddle = layout == "paddle"
        #: Names of tensors that are averaged, and of fused layers that could not be split.
        self.averaged: list[str] = []
        self.uncut: list[str] = []

    def of(self, name: str, shape: Sequence[int], named: bool = False) -> Matrices | None:
        """How a tensor is split into matrices; None if it is not a matrix of a layer.

        Args:
            name: Its name.
            shape: Its shape.
            named: Whether a rule gives this tensor its method: then embeddings, heads and routers are matrices, too.
        """
        found = self._of(name, shape, named)
        if found is None:
            self.averaged.append(name)
        return found

    def _of(self, name: str, shape: Sequence[int], named: bool) -> Matrices | None:
        module, leaf = module_of(name), name.rpartition(".")[2]
        experts = len(shape) == 3 and "expert" in name
        if len(shape) < 2 or not (leaf.endswith("weight") or experts):
            return None
        module = leaf.removesuffix("_weight") if leaf != "weight" else module
        if not named and _is_no_layer(name, module, len(shape)):
            return None
        units, rows = (shape[0], shape[1]) if experts else (1, shape[0])
        columns = math.prod(shape[2 if experts else 1 :])
        by_channel = len(shape) > 2 and not experts and shape[1] == 1
        if not units or min(rows, columns) < 2 or by_channel:
            return None
        if experts:
            out_first = self._experts_out_first(module, rows, columns)
        else:
            turned = TRANSPOSED.get(self._geometry.architecture or "", ())
            out_first = len(shape) > 2 or (not self._paddle and module not in turned)
        parts = self._parts(name, module, rows if out_first else columns)
        return Matrices(units, rows, columns, out_first, parts)

    def _experts_out_first(self, module: str, rows: int, columns: int) -> bool:
        hidden = self._geometry.hidden
        if rows != columns and hidden in (rows, columns):
            outputs_are_hidden = module in ("down_proj", "w2")
            return (rows == hidden) == outputs_are_hidden
        return not self._paddle and self._geometry.architecture not in TRANSPOSED_EXPERTS

    def _parts(self, name: str, module: str, outputs: int) -> tuple[Runs, ...]:
        """For each part of a fused layer, its runs of outputs as (first, count); empty for other layers."""
        geometry, fusion = self._geometry, FUSED.get(module)
        groups, shares = 1, tuple[int, ...]()
        heads, narrow = geometry.heads or 0, geometry.key_value_heads or 0
        if module in THIRDS:
            shares = (1, 1, 1)
        elif fusion is not None and not fusion.by_head:
            shares = (1,) * len(fusion.parts)
            if geometry.architecture in ALTERNATING:
                groups = outputs // len(shares)
        elif fusion is not None and heads and narrow and heads % narrow == 0:
            by_head = fuses_by_head(geometry.architecture)
            groups, shares = (narrow, (heads // narrow, 1, 1)) if by_head else (1, (heads, narrow, narrow))
        elif module == "query_key_value" and geometry.architecture in BY_HEAD and heads:
            groups, shares = heads, (1, 1, 1)
        elif fusion is None and module != "query_key_value":
            return ()
        unit, rest = divmod(outputs, groups * sum(shares)) if shares else (0, 1)
        if rest or not unit:
            self.uncut.append(name)
            return ()
        width = outputs // groups
        begins = [sum(shares[:part]) * unit for part in range(len(shares))]
        return tuple(
            tuple((group * width + begin, share * unit) for group in range(groups))
            for begin, share in zip(begins, shares, strict=True)
        )

    def notes(self) -> Iterator[str]:
        """Notes on tensors that are averaged, and on fused layers that could not be split."""
        if self.averaged:
            names = ", ".join(group_names(self.averaged))
            yield f"Averaged (weighted mean), as they are not weight matrices of layers: {names}."
        if self.uncut:
            names = ", ".join(group_names(self.uncut))
            yield f"Fused layers merged as one matrix, as the sizes of their parts are unknown: {names}."


def _is_no_layer(name: str, module: str, dimensions: int) -> bool:
    if dimensions == 2 and EMBEDDINGS.search(module):
        return True
    return module in ROUTERS or any(f".{name}".endswith(f".{head}.weight") for head in HEADS)

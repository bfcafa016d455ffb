"""The document of ``modelfuse inspect --json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from modelfuse.cli.json_output import Document
from modelfuse.inspection.inspected_model import Amount, Inspection, Remark, Shard, TensorFacts, Tie
from modelfuse.inspection.model_facts import AdapterFacts, TokenizerFacts
from modelfuse.inspection.module_tree import Module


class Inspect(Document, frozen=True, kw_only=True):
    """What is in a model: ``modelfuse inspect --json``."""

    document: Literal["inspect/1"] = "inspect/1"
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


def of_inspection(found: Inspection) -> Inspect:
    """The document of ``inspect``."""
    return Inspect(**{name: getattr(found, name) for name in Inspection.__struct_fields__})

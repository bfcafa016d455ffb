"""The document of ``modelfuse inspect --json``."""

from __future__ import annotations

from typing import Any, Literal, cast

from msgspec import defstruct
from msgspec.structs import fields

from modelfuse.cli.json_output import Document
from modelfuse.inspection.inspected_model import Inspection

#: The fields of an :class:`Inspection`, as a document.
InspectDocument = cast(
    type[Document],
    defstruct(
        "InspectDocument",
        [("document", Literal["inspect/1"], "inspect/1"), *((each.name, each.type) for each in fields(Inspection))],
        bases=(Document,),
        namespace={"__doc__": "The content of a model: ``modelfuse inspect --json``."},
        module=__name__,
        frozen=True,
        kw_only=True,
    ),
)


def of_inspection(found: Inspection) -> Document:
    """The document of an inspection."""
    values: dict[str, Any] = {each.name: getattr(found, each.name) for each in fields(Inspection)}
    return InspectDocument(**values)

"""What single settings may be: sizes, numbers, places, and the inputs of a merge."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator

from modelfuse.hub_names import HubName, hub_name
from modelfuse.recipe_checks import is_path
from modelfuse.storage import Place, Url, place_of

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


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
    return int(Decimal(match[1]) * UNITS[match[2]])


def _absolute(value: object) -> Place:
    if isinstance(value, str) and not is_path(value):
        raise ValueError("this is no path")
    if not isinstance(value, str | Path | Url):
        raise ValueError("input is not a valid path")
    return place_of(value)


def _input(value: object) -> Place | HubName:
    """A place; or a hub name, if it looks like one and nothing of that name is here."""
    if isinstance(value, str) and not os.path.lexists(value) and (named := hub_name(value)) is not None:
        return named
    return value if isinstance(value, HubName) else _absolute(value)


def _endpoint(value: object) -> object:
    if isinstance(value, str) and re.match(r"https?://[^/\s]+", value) is None:
        raise ValueError("this is no address such as https://hub.example.org")
    return value.rstrip("/") if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0, lt=2**63)]
#: A path, made absolute, or a URL; as text it is without what is secret of it.
AbsolutePath = Annotated[Place, PlainValidator(_absolute), PlainSerializer(str, when_used="json")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
#: Most tensors are merged in float32, so their weights have its range.
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-3e38, le=3e38)]
Endpoint = Annotated[str, BeforeValidator(_endpoint)]
#: A model to merge: where it is, or what it is called on a hub.
Input = Annotated[Place | HubName, PlainValidator(_input), PlainSerializer(str)]

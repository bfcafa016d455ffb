"""A configuration's method for one tensor, as the methods here are declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelfuse.errors import RecipeError
from modelfuse.methods import arcee
from modelfuse.methods.applied import Applied

#: Parameters by name, None where one is not given.
Values = Mapping[str, float | int | bool | None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for one tensor.

    Attributes:
        name: The method.
        each: The parameters of every model, without the base's where the method compares with it.
        whole: Those of the merge.
        seed: Of random draws.
        streams: Each model's number, which its draws depend on.
    """

    name: str
    each: Sequence[Values]
    whole: Values
    seed: int
    streams: Sequence[int]


def method_of(request: Request) -> Applied:
    """The method that makes one tensor of its sources.

    Raises:
        RecipeError: If its parameters cannot be.
    """
    try:
        return arcee.applied(request.name, request.each, request.whole, seed=request.seed, streams=request.streams)
    except ValueError as error:
        raise RecipeError(str(error), "Change the parameters of the models that the message is about.") from error

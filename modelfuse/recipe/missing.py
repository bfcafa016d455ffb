"""Policies for tensors that only some inputs have."""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, Literal, NamedTuple, get_args

from modelfuse.recipe.schema import Instead

#: ``error`` refuses, ``copy`` takes the base's or merges those of the models that have it, ``drop`` leaves it out.
Policy = Literal["error", "copy", "drop"]
POLICIES: tuple[str, ...] = get_args(Policy)


class MissingRule(NamedTuple):
    """A policy for the tensors whose names a glob matches."""

    pattern: str
    policy: Policy

    def __str__(self) -> str:
        return f"{self.pattern}={self.policy}" if self.pattern != "*" else self.policy


def read_missing(value: object) -> MissingRule:
    """A policy, or ``PATTERN=POLICY``.

    >>> read_missing("mtp.*=copy")
    MissingRule(pattern='mtp.*', policy='copy')

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, MissingRule):
        return value
    pattern, equals, policy = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    if policy not in POLICIES or (equals and not pattern):
        raise ValueError(f"give {', '.join(POLICIES)}, or PATTERN=POLICY such as 'mtp.*=copy'")
    return MissingRule(pattern or "*", policy)  # type: ignore[arg-type]


MissingSetting = Annotated[MissingRule, Instead(read_missing)]


def policy_of(rules: tuple[MissingRule, ...], name: str) -> Policy:
    """The policy of the first rule whose pattern matches a name; ``error`` if none does."""
    return next((rule.policy for rule in rules if re.match(fnmatch.translate(rule.pattern), name)), "error")

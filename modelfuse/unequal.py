"""How a merge is refused whose models have different tensors where they should be equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelfuse.checkpoints import Checkpoint
from modelfuse.copying import Difference
from modelfuse.errors import MismatchError

#: Differing tensors that an error lists.
MOST_LINES = 20


def describe_twins(differences: Sequence[Difference], what: str, hint: str) -> MismatchError:
    """What is to be said of pairs that should be equal, and what to do."""
    return MismatchError(f"{what}:\n" + _listed(each.name for each in differences), hint)


def describe_copies(differences: Sequence[Difference], models: Sequence[Checkpoint]) -> MismatchError:
    """Which of the models have another tensor than the first."""
    lines = (
        f"{each.name} of {models[0].path} is not that of {' and '.join(str(models[at].path) for at in each.sources)}"
        for each in differences
    )
    return MismatchError(
        "These tensors cannot be merged, only copied, but they differ:\n" + _listed(lines),
        "Say which model to take them from with --unmerged_from PATH.",
    )


def _listed(lines: Iterable[str]) -> str:
    """Lines in an order that does not depend on workers, the first ones only."""
    lines = sorted(lines)
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MOST_LINES], *more])

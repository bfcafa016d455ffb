"""The orientation of the base's weights, and whether an adapter's factors fit them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec.structs import replace

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.adapters.base_names import BaseTensor, Targets
from modelfuse.checkpoints.adapters.config import AdapterConfig
from modelfuse.checkpoints.adapters.low_rank_terms import ExpertIndex, Term
from modelfuse.checkpoints.adapters.tensor_roles import AdaptedLayer, AdapterContents
from modelfuse.errors import CheckpointError, MismatchError

Shape = tuple[int, ...]
#: Models whose experts are [experts, in, out] in one tensor; all others that PEFT knows have [experts, out, in].
TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
#: The pairs of factors that a layer may have: the second one's first dimension is the rank, of Paddle's LoRA the last.
PAIRS = (("A", "B"), *((f"{part}_a", f"{part}_b") for part in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")))


class Fitting:
    """Fits an adapter's factors to the base's tensors.

    Args:
        weights: The adapter's own tensors.
        settings: Its configuration.
        base: The base.
        paddle: Whether the base has Paddle's layout, [in, out]; None if unknown.
        contents: The adapter's tensors by role.
        targets: The base's tensors that they change.

    Attributes:
        out_first: Whether the base stores Linear weights as [out, in].
    """

    def __init__(
        self, weights: Checkpoint, settings: AdapterConfig, base: Checkpoint, paddle: bool | None,
        contents: AdapterContents, targets: Mapping[str, Targets],
    ) -> None:  # fmt: skip
        self.weights, self.settings, self.base, self.paddle = weights, settings, base, paddle
        self.targets = targets
        self.out_first = self._orientation(contents)

    def _orientation(self, contents: AdapterContents) -> bool:
        """Whether the base stores Linear weights as [out, in]: decided by most of the shapes that are not square.

        Raises:
            MismatchError: If all are square.
        """
        votes = {True: 0, False: 0}
        squares = False
        for module in contents.modules.values():
            for target in self.targets[module.weight] if module.kind == "lora" and not module.embedding else ():
                if target.block is not None:  # Stacked experts have an orientation of their own.
                    continue
                term = self.term(module, target)
                ways = [out_first for out_first in (True, False) if self.fits(term, target, out_first)]
                if len(ways) == 1:
                    votes[ways[0]] += 1
                squares |= len(ways) > 1
        if votes[True] != votes[False]:
            return votes[True] > votes[False]
        if self.paddle is not None:
            return not self.paddle
        if self.base.config.get("source") == "paddle":
            return False
        if self.settings.kind == "peft" or not squares:
            return not self.settings.transposed
        raise MismatchError(
            f"Whether the base {self.base.path} stores Linear weights as [out, in] or [in, out] cannot be known: all "
            f"that the adapter {self.weights.path} changes are square",
            "Say it with --input_layout.",
        )

    def ways(self, target: BaseTensor, embedding: bool) -> tuple[bool, ...]:
        """Whether a weight is [out, in]: the possible answers, the most likely first."""
        if embedding:
            return (False,)
        first = self.out_first
        if target.block is not None:
            paddle = self.settings.kind == "paddle" if self.paddle is None else self.paddle
            first = not paddle and self.base.config.get("model_type") not in TRANSPOSED_EXPERTS
        return first, not first

    def fits(self, term: Term | None, target: BaseTensor, out_first: bool) -> bool:
        """Whether a product has the shape of a tensor of the base in this orientation."""
        shape = self._shape_of(target)
        if term is None or len(shape) < 2:
            return False
        rows, columns = (term.outputs, term.inputs) if out_first else (term.inputs, term.outputs)
        return shape[0] == rows and math.prod(shape[1:]) == columns

    def _shape_of(self, target: BaseTensor) -> Shape:
        return self.base[target.name].shape[0 if target.block is None else 1 :]

    def term(self, module: AdaptedLayer, target: BaseTensor) -> Term | None:
        """The product that changes a tensor of the base; None if the factors' shapes do not match."""
        a, b = module.factors["A"], module.factors["B"]
        expert = self._expert(module, target)
        if not self._are_factors(a.shape, b.shape, expert):
            return None
        first = (target.block or 0) * math.prod(self._shape_of(target))
        term = Term(a, b, self._transposed, self.settings.scale_of(module.name), None, expert, first)
        if b.size != self._count(expert) * term.rank * b.shape[-1 if self._transposed else 0]:
            return None
        if target.share is None:
            return term
        cut = target.share.cut(term.outputs)
        return replace(term, cut=cut) if cut is not None else None

    @property
    def _transposed(self) -> bool:
        return self.settings.kind == "paddle"

    def _expert(self, module: AdaptedLayer, target: BaseTensor) -> ExpertIndex | None:
        """The expert whose factors are used, if the adapter stacks those of all experts."""
        if target.expert is None:
            return None
        return ExpertIndex(target.expert, 1 + max(each.expert or 0 for each in self.targets[module.weight]))

    @staticmethod
    def _count(expert: ExpertIndex | None) -> int:
        return 1 if expert is None else expert.of

    def _are_factors(self, a: Shape, b: Shape, expert: ExpertIndex | None) -> bool:
        if min(len(a), len(b)) < 2 or not math.prod(a) * math.prod(b):
            return False
        if not self._transposed:
            return expert is None or (len(a) == len(b) == 2 and a[0] % expert.of == 0)
        if expert is None:
            return len(a) == 2
        return len(a) == len(b) == 3 and a[0] == b[0] == expert.of

    def check_rank(self, module: AdaptedLayer) -> None:
        """Check the factors' rank against the configuration.

        Raises:
            CheckpointError: If it differs.
        """
        wanted = self.settings.rank_of(module.name)
        experts = len({target.expert for target in self.targets[module.weight]} - {None})
        for a, b in ((module.factors[one], module.factors[two]) for one, two in PAIRS if one in module.factors):
            if self._transposed:
                found = {*a.shape[-1:], *b.shape[-2:-1]}
            elif module.kind == "lora":
                found = {*a.shape[:1], *b.shape[1:2]}
            else:  # That of the first is checked with the second.
                found = {*b.shape[:1]}
            if found != {wanted * (experts or 1) if not self._transposed else wanted}:
                raise CheckpointError(
                    f"{self.weights.path}: the rank of {module.name} is {wanted} by {self.settings.file.name}, but "
                    f"{a.name} is {list(a.shape)} and {b.name} {list(b.shape)}"
                )

"""An adapter laid over its base: which tensors of the base become what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.base_names import Names, Share, Targets
from modelfuse.checkpoints.adapters.computed_tensors import ComputedTensor, LowRankTensor, Widened
from modelfuse.checkpoints.adapters.config import Settings
from modelfuse.checkpoints.adapters.dora import DoraTensor
from modelfuse.checkpoints.adapters.low_rank_terms import Cut, Shared, Term, difference_type
from modelfuse.checkpoints.adapters.tensor_roles import Contents, Module, sort_out
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.errors import CheckpointError, MismatchError
from modelfuse.storage import has_file
from modelfuse.storage.files import SourceFile

Shape = tuple[int, ...]


def lay_over(weights: Checkpoint, settings: Settings, base: Checkpoint, paddle: bool | None, strict: bool) -> Adapter:
    """Lay an adapter over its base.

    Args:
        weights: The adapter's own tensors.
        settings: Its settings.
        base: The base; its tensors may be computed themselves.
        paddle: Whether the base has Paddle's layout, [in, out]; None if that is not known.
        strict: Whether values that are not finite are an error.

    Raises:
        CheckpointError: If the adapter is malformed or of an unsupported kind.
        MismatchError: If it does not fit the base; everything that does not is listed.
    """
    return _Laying(weights, settings, base, paddle, Shared(strict)).done()


@dataclass
class _Laying:
    weights: Checkpoint
    settings: Settings
    base: Checkpoint
    paddle: bool | None
    shared: Shared
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    account: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def done(self) -> Adapter:
        contents = sort_out(self.weights, self.settings)
        places = self._find(contents)
        self._out_first = self._orientation(contents, places)
        for module in contents.modules.values():
            self._adapt(module, places)
        for name, tensor in contents.whole.items():
            self._replace(name, tensor, places)
        copies = tuple(self._copies(contents, places))
        if self.problems:
            raise MismatchError(
                f"The adapter {self.weights.path} does not fit the base {self.base.path}:\n"
                + "\n".join(f"  {problem}" for problem in group_names(self.problems)),
                "Give the base that the adapter was trained on.",
            )
        return Adapter(
            self.weights.path,
            f"{self.settings.kind} adapter",
            {name: self.tensors.get(name, tensor) for name, tensor in self.base.tensors.items()},
            self.base.aliases,
            self.weights.metadata,
            self.base.config,
            own=(*self.weights.files, *self._configs()),
            account=self.account,
            copies=copies,
            changed=frozenset(self.tensors),
            modules=self.modules,
            transposed=not self._out_first,
        )

    def _configs(self) -> Iterator[SourceFile]:
        """Its settings, and the model's beside it, which may say how the base was quantized."""
        yield SourceFile.at(self.settings.file)
        beside = self.settings.file.with_name(CONFIG_FILE)
        if has_file(beside):
            yield SourceFile.at(beside)

    def _find(self, contents: Contents) -> dict[str, Targets]:
        """The base's tensors for every name: of weights, of trained biases, of whole tensors, of copies."""
        wanted = [f"{name}.weight" for name in contents.modules]
        wanted += [f"{name}.bias" for name, module in contents.modules.items() if "bias" in module.factors]
        wanted += [*contents.whole, *contents.copies]
        return Names(self.base).find(self.weights.path, list(dict.fromkeys(wanted)))

    # --- which way round ---------------------------------------------------------------------------------------

    def _orientation(self, contents: Contents, places: Mapping[str, Targets]) -> bool:
        """Whether the base stores Linear weights as [out, in]: what most shapes say counts for those that are square.

        Raises:
            MismatchError: If nothing tells.
        """
        votes = {True: 0, False: 0}
        squares = False
        for module in contents.modules.values():
            for place in places[f"{module.name}.weight"] if not module.embedding else ():
                term = self._term(module, place.share)
                ways = [out_first for out_first in (True, False) if self._fits(term, place.name, out_first)]
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

    def _fits(self, term: Term | None, name: str, out_first: bool) -> bool:
        if term is None:
            return False
        shape = self.base[name].shape
        if len(shape) < 2:
            return False
        rows, columns = (term.outputs, term.inputs) if out_first else (term.inputs, term.outputs)
        return shape[0] == rows and math.prod(shape[1:]) == columns

    # --- what becomes of it ------------------------------------------------------------------------------------

    def _adapt(self, module: Module, places: Mapping[str, Targets]) -> None:
        self._check_rank(module)
        for place in places[f"{module.name}.weight"]:
            term, base = self._term(module, place.share), self.base[place.name]
            ways = [way for way in ((False,) if module.embedding else (self._out_first, not self._out_first))
                    if self._fits(term, place.name, way)]  # fmt: skip
            if term is None or not ways:
                self._misfit(module.factors["B"], module.factors["A"], base)
                continue
            self._put(place.name, self._low_rank(module, term, base, ways[0]), module)
            self.modules.setdefault(place.name, module.name)
        for place in places.get(f"{module.name}.bias", ()) if "bias" in module.factors else ():
            bias, scale = module.factors["bias"], self.settings.scale_of(module.name)
            self._put(place.name, self._computed(bias, place.name, place.share, scale), module, "bias")

    def _term(self, module: Module, share: Share | None) -> Term | None:
        a, b = module.factors["A"], module.factors["B"]
        transposed = self.settings.kind == "paddle"
        if len(a.shape) < 2 or len(b.shape) < 2 or not a.size or not b.size or (transposed and len(a.shape) > 2):
            return None
        term = Term(a, b, transposed, self.settings.scale_of(module.name))
        if b.size != term.rank * b.shape[1 if transposed else 0]:
            return None
        if share is None:
            return term
        cut = share.cut(term.outputs)
        return replace(term, cut=cut) if cut is not None else None

    def _check_rank(self, module: Module) -> None:
        a, b = module.factors["A"], module.factors["B"]
        last = self.settings.kind == "paddle"
        ranks = {a.shape[-1 if last else 0] if a.shape else 0, (b.shape[0 if last else 1]) if len(b.shape) > 1 else 0}
        wanted = self.settings.rank_of(module.name)
        if ranks != {wanted}:
            raise CheckpointError(
                f"{self.weights.path}: the rank of {module.name} is {wanted} by {self.settings.file.name}, but "
                f"{a.name} is {list(a.shape)} and {b.name} {list(b.shape)}"
            )

    def _low_rank(self, module: Module, term: Term, base: StoredTensor, out_first: bool) -> StoredTensor:
        dtype = difference_type(term.a, term.b)
        difference = LowRankTensor(
            base.name, dtype, base.shape, term.a.file, 0, (term,), out_first, self.shared
        )  # fmt: skip
        magnitude = module.factors.get("magnitude")
        if magnitude is None:
            return difference
        if magnitude.size != term.outputs:
            self.problems.append(f"{magnitude.name} is {list(magnitude.shape)}, but there are {term.outputs} outputs")
        if len(base.shape) > 2 or term.cut is not None:
            self.problems.append(f"{magnitude.name}: DoRA is supported on whole Linear and Embedding layers only")
        dtype = difference_type(base, magnitude, difference)
        return DoraTensor(base.name, dtype, base.shape, term.a.file, 0, base, difference, magnitude)

    def _put(self, name: str, tensor: StoredTensor, module: Module, *parts: str) -> None:
        """Note what a tensor of the base becomes; differences of several parts of a fused layer are added up."""
        for part in parts or ("A", "B", "magnitude"):
            if part in module.factors:
                self.account.setdefault(module.factors[part].name, []).append(name)
        there = self.tensors.get(name)
        if isinstance(there, LowRankTensor) and isinstance(tensor, LowRankTensor):
            tensor = replace(there, terms=(*there.terms, *tensor.terms), dtype=difference_type(there, tensor))
        elif there is not None:
            self.problems.append(f"{name} of the base is changed by two of its tensors")
        self.tensors[name] = tensor

    def _replace(self, name: str, tensor: StoredTensor, places: Mapping[str, Targets]) -> None:
        for place in places[name]:
            self.account.setdefault(tensor.name, []).append(place.name)
            if place.name in self.tensors:
                self.problems.append(f"{place.name} of the base is changed by {tensor.name} and by another tensor")
            self.tensors[place.name] = self._computed(tensor, place.name, place.share, None)

    def _computed(self, tensor: StoredTensor, name: str, share: Share | None, scale: float | None) -> StoredTensor:
        """The tensor as the base stores it: transposed or cut where that differs."""
        base = self.base[name]
        outputs_last = self.settings.kind == "paddle" and len(tensor.shape) == 2
        cut = share.cut(tensor.shape[-1 if outputs_last else 0]) if share is not None and tensor.shape else None
        shape = _cut_shape(tensor.shape, cut, outputs_last)
        turns = self._turns(name, shape, base.shape)
        if (shape[::-1] if turns else shape) != base.shape or (share is not None and (cut is None or share.widens)):
            self._misfit(tensor, None, base)
        if scale is None and cut is None and not turns:
            return replace(tensor, name=name)
        return ComputedTensor(
            name,
            difference_type(tensor),
            base.shape,
            tensor.file,
            0,
            tensor,
            scale,
            turns,
            cut,
            outputs_last,
            self.shared,
        )

    def _turns(self, name: str, shape: Shape, wanted: Shape) -> bool:
        """Whether a whole weight is the transpose of what the base stores."""
        if len(shape) != 2 or (shape != wanted and shape[::-1] != wanted):
            return False
        if shape[0] != shape[1]:
            return shape != wanted
        outputs_first = self.settings.kind == "peft" and not self.settings.transposed
        return outputs_first != self._out_first and not name.endswith((*EMBEDDINGS, *HEADS))

    def _misfit(self, one: StoredTensor, other: StoredTensor | None, base: StoredTensor) -> None:
        shapes = " and ".join(f"{each.name} {list(each.shape)}" for each in (one, other) if each is not None)
        self.problems.append(f"{shapes} cannot go into {base.name} {list(base.shape)}")

    def _copies(self, contents: Contents, places: Mapping[str, Targets]) -> Iterator[tuple[StoredTensor, StoredTensor]]:
        for name, tensor in contents.copies.items():
            for place in places[name]:
                base = self.base[place.name]
                self.account[tensor.name] = [f"a copy of {place.name}"]
                if tensor.shape != base.shape or place.share is not None:
                    self._misfit(tensor, None, base)
                yield (tensor, base) if tensor.dtype == base.dtype else (Widened.of(tensor), Widened.of(base))


def _cut_shape(shape: Shape, cut: Cut | None, last: bool) -> Shape:
    if cut is None:
        return shape
    return (*shape[:-1], cut.outputs) if last else (cut.outputs, *shape[1:])

"""Apply an adapter to its base: build the changed tensors of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelfuse.checkpoints import CONFIG_FILE, Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.added_rows import as_trained, with_added_rows
from modelfuse.checkpoints.adapters.base_names import BaseTensor, Names, Share, Targets, renamed_by
from modelfuse.checkpoints.adapters.changed_base import scaled, with_rows
from modelfuse.checkpoints.adapters.computed_tensors import ComputedTensor, LowRankTensor, Widened
from modelfuse.checkpoints.adapters.config import AdapterConfig
from modelfuse.checkpoints.adapters.dora import DoraTensor
from modelfuse.checkpoints.adapters.fitting import Fitting
from modelfuse.checkpoints.adapters.heads import has_other_rows, new_heads
from modelfuse.checkpoints.adapters.low_rank_terms import FusedPart, Shared, Term, difference_type
from modelfuse.checkpoints.adapters.products import product
from modelfuse.checkpoints.adapters.tensor_roles import AdaptedLayer, AdapterContents, sort_out
from modelfuse.checkpoints.name_rules import told
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS, group_names
from modelfuse.errors import MismatchError
from modelfuse.storage import has_file
from modelfuse.storage.files import SourceFile

Shape = tuple[int, ...]
#: The way out where rows may be missing.
MORE_ROWS = (
    "Give the base that the adapter was trained on. If tokens were added to it: with as many rows "
    "(resize_token_embeddings of transformers), or save the adapter with save_embedding_layers=True of PEFT."
)


def lay_over(
    weights: Checkpoint, settings: AdapterConfig, base: Checkpoint, paddle: bool | None, strict: bool
) -> Adapter:
    """Open an adapter over its base.

    Args:
        weights: The adapter's own tensors.
        settings: Its configuration.
        base: The base; its tensors may be computed.
        paddle: Whether the base has Paddle's layout, [in, out]; None if unknown.
        strict: Whether non-finite values are an error.

    Raises:
        CheckpointError: If the adapter is malformed or of an unsupported kind.
        MismatchError: If it does not fit the base; all problems are listed.
    """
    return _Laying(weights, settings, base, paddle, Shared(strict)).done()


@dataclass
class _Laying:
    weights: Checkpoint
    settings: AdapterConfig
    base: Checkpoint
    paddle: bool | None
    shared: Shared
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    account: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    _lacks_rows: bool = False

    def done(self) -> Adapter:
        self.names = Names(self.base)
        contents = sort_out(self.weights, self.settings, self.names.has)
        added = new_heads(contents, self.settings, self.names.has)
        contents.whole = {name: tensor for name, tensor in contents.whole.items() if name not in added}
        self.account |= {tensor.name: [name] for name, tensor in added.items()}
        targets = self._find(contents)
        self.base, grown = with_added_rows(self.base, contents, targets)
        self._fitting = Fitting(self.weights, self.settings, self.base, self.paddle, contents, targets)
        for module in contents.modules.values():
            self._adapt(module, targets)
        for name, tensor in contents.whole.items():
            self._replace(name, tensor, targets)
        self.tensors |= as_trained(grown, self.tensors)
        self.resized += grown
        copies = tuple(self._copies(contents, targets))
        if self.problems:
            raise MismatchError(
                f"The adapter {self.weights.path} does not fit the base {self.base.path}:\n"
                + "\n".join(f"  {problem}" for problem in group_names(self.problems)),
                MORE_ROWS if self._lacks_rows else "Give the base that the adapter was trained on.",
            )
        return Adapter(
            self.weights.path,
            f"{self.settings.kind} adapter",
            {**{name: self.tensors.get(name, tensor) for name, tensor in self.base.tensors.items()}, **added},
            self.base.aliases,
            self.weights.metadata,
            self.base.config,
            own=(*self.weights.files, *self._configs()),
            account=self.account,
            copies=copies,
            changed=frozenset(self.tensors),
            modules=self.modules,
            renamed=tuple(told(dict(renamed_by(targets)))),
            transposed=not self._fitting.out_first,
            added=tuple(added),
            resized=tuple(self.resized),
            task=self.settings.task,
        )

    def _configs(self) -> Iterator[SourceFile]:
        """Its configuration, and the config.json beside it, which may say how the base was quantized."""
        yield SourceFile.at(self.settings.file)
        beside = self.settings.file.with_name(CONFIG_FILE)
        if has_file(beside):
            yield SourceFile.at(beside)

    def _find(self, contents: AdapterContents) -> dict[str, Targets]:
        """The base's tensors for the names of adapted weights, trained biases, whole tensors and copies."""
        wanted = [module.weight for module in contents.modules.values()]
        wanted += [f"{name}.bias" for name, module in contents.modules.items() if "bias" in module.factors]
        wanted += [*contents.whole, *contents.copies]
        return self.names.find(self.weights.path, list(dict.fromkeys(wanted)))

    # --- what becomes of it ------------------------------------------------------------------------------------

    def _adapt(self, module: AdaptedLayer, targets: Mapping[str, Targets]) -> None:
        if module.kind in ("lora", "hada", "lokr"):
            self._fitting.check_rank(module)
        for target in targets[module.weight]:
            made = self._made(module, target)
            if made is None:
                self._misfit([*module.factors.values()], self.base[target.name])
                continue
            self._put(target.name, made, module)
            self.modules.setdefault(target.name, module.name)
        for target in targets.get(f"{module.name}.bias", ()) if "bias" in module.factors else ():
            bias, scale = module.factors["bias"], self.settings.scale_of(module.name)
            self._put(target.name, self._computed(bias, target.name, target.share, scale), module, "bias")

    def _made(self, module: AdaptedLayer, target: BaseTensor) -> StoredTensor | None:
        """The changed tensor of the base; None if the adapter's tensors do not fit it."""
        base, ways = self.base[target.name], self._fitting.ways(target, module.embedding)
        if module.kind == "lora":
            term = self._fitting.term(module, target)
            fits = [way for way in ways if self._fitting.fits(term, target, way)]
            return self._low_rank(module, term, base, fits[0]) if term is not None and fits else None
        if target[1:] != (None, None, None):
            self.problems.append(f"{base.name} is fused, which is supported for LoRA only")
            return base
        if module.kind == "tokens":
            return with_rows(base, module.factors["tokens"], self.settings.tokens_of(module.name), self.shared)
        if module.kind == "ia3":
            return self._scaled(module, base)
        return product(module.factors, module.kind, base, self.settings.scale_of(module.name), ways, self.shared)

    def _scaled(self, module: AdaptedLayer, base: StoredTensor) -> StoredTensor | None:
        """A weight times IA³'s factors; the bias too, if the factors are per output."""
        made = scaled(base, module.factors["ia3_l"], self._fitting.out_first, self.shared)
        bias = self.names.known(f"{module.name}.bias")
        if made is not None and bias is not None and (made.axis == 0) == self._fitting.out_first:
            numbers = scaled(self.base[bias], module.factors["ia3_l"], True, self.shared)
            if numbers is not None:
                self._put(bias, numbers, module, "ia3_l")
        return made

    def _low_rank(self, module: AdaptedLayer, term: Term, base: StoredTensor, out_first: bool) -> StoredTensor:
        dtype = difference_type(term.a, term.b)
        difference = LowRankTensor(
            base.name, dtype, base.shape, term.a.file, 0, (term,), out_first, self.shared
        )  # fmt: skip
        magnitude = module.factors.get("magnitude")
        if magnitude is None:
            return difference
        if magnitude.size != term.outputs:
            self.problems.append(f"{magnitude.name} is {list(magnitude.shape)}, but there are {term.outputs} outputs")
        if len(base.shape) > 2 or term.cut is not None or term.expert is not None:
            self.problems.append(f"{magnitude.name}: DoRA is supported on whole Linear and Embedding layers only")
        dtype = difference_type(base, magnitude, difference)
        return DoraTensor(base.name, dtype, base.shape, term.a.file, 0, base, difference, magnitude)

    def _put(self, name: str, tensor: StoredTensor, module: AdaptedLayer, *parts: str) -> None:
        """Record the changed tensor of the base; differences to several parts of a fused layer are summed."""
        for part in parts or module.factors:
            if part != "bias" or parts:
                self.account.setdefault(module.factors[part].name, []).append(name)
        there = self.tensors.get(name)
        if isinstance(there, LowRankTensor) and isinstance(tensor, LowRankTensor):
            tensor = replace(there, terms=(*there.terms, *tensor.terms), dtype=difference_type(there, tensor))
        elif there is not None:
            self.problems.append(f"{name} of the base is changed by two of its tensors")
        self.tensors[name] = tensor

    def _replace(self, name: str, tensor: StoredTensor, targets: Mapping[str, Targets]) -> None:
        for target in targets[name]:
            self.account.setdefault(tensor.name, []).append(target.name)
            if target.name in self.tensors:
                self.problems.append(f"{target.name} of the base is changed by {tensor.name} and by another tensor")
            if target.share is None and has_other_rows(target.name, tensor, self.base[target.name]):
                self.resized.append(target.name)
                self.tensors[target.name] = replace(tensor, name=target.name)
                continue
            self.tensors[target.name] = self._computed(tensor, target.name, target.share, None)

    def _computed(self, tensor: StoredTensor, name: str, share: Share | None, scale: float | None) -> StoredTensor:
        """The tensor as the base stores it: transposed or sliced if that differs."""
        base = self.base[name]
        outputs_last = self.settings.kind == "paddle" and len(tensor.shape) == 2
        cut = share.cut(tensor.shape[-1 if outputs_last else 0]) if share is not None and tensor.shape else None
        shape = _cut_shape(tensor.shape, cut, outputs_last)
        turns = self._turns(name, shape, base.shape)
        if (shape[::-1] if turns else shape) != base.shape or (share is not None and (cut is None or share.widens)):
            self._misfit([tensor], base)
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
        return outputs_first != self._fitting.out_first and not name.endswith((*EMBEDDINGS, *HEADS))

    def _misfit(self, tensors: Sequence[StoredTensor], base: StoredTensor) -> None:
        shapes = " and ".join(f"{each.name} {list(each.shape)}" for each in tensors)
        self.problems.append(f"{shapes} cannot go into {base.name} {list(base.shape)}")
        self._lacks_rows |= base.name.endswith((*EMBEDDINGS, *HEADS))

    def _copies(
        self, contents: AdapterContents, targets: Mapping[str, Targets]
    ) -> Iterator[tuple[StoredTensor, StoredTensor]]:
        for name, tensor in contents.copies.items():
            for target in targets[name]:
                base = self.base[target.name]
                self.account[tensor.name] = [f"a copy of {target.name}"]
                if target.name in self.resized and tensor.shape == self.tensors[target.name].shape:
                    continue  # Of the rows that it was trained with.
                if tensor.shape != base.shape or target.share is not None:
                    self._misfit([tensor], base)
                yield (tensor, base) if tensor.dtype == base.dtype else (Widened.of(tensor), Widened.of(base))


def _cut_shape(shape: Shape, cut: FusedPart | None, last: bool) -> Shape:
    if cut is None:
        return shape
    return (*shape[:-1], cut.outputs) if last else (cut.outputs, *shape[1:])

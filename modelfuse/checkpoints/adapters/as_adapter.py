"""Save a merge as one PEFT adapter: its tensors and adapter_config.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from modelfuse.checkpoints import Checkpoint, StoredTensor
from modelfuse.checkpoints.adapters.adapter import Adapter
from modelfuse.checkpoints.adapters.arrays import Recent
from modelfuse.checkpoints.adapters.core_space import fits_core, products_rank
from modelfuse.checkpoints.adapters.factored import RUN, Factoring, FactorTensor, WholeTensor, difference
from modelfuse.checkpoints.adapters.low_rank_terms import Shared, difference_type
from modelfuse.checkpoints.adapters.selection import TOKENS, Selection
from modelfuse.checkpoints.adapters.tensor_roles import PEFT_PREFIX
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, group_names
from modelfuse.errors import MismatchError, RecipeError
from modelfuse.kernels.matrices import Matrices
from modelfuse.methods.applied import Applied
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.recipe import Recipe


class TensorChange(NamedTuple):
    """A tensor of the base that changes.

    Attributes:
        name: Its name.
        sources: The models' tensors.
        base: The base's.
        method: What merges their differences.
        drawn_as: The tensor whose random draws it uses, if not its own.
        matrices: How it is split into matrices, for whole-matrix methods.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    base: StoredTensor
    method: Applied
    drawn_as: str = ""
    matrices: Matrices | None = None


@dataclass(frozen=True)
class AdapterOutput:
    """The content of an adapter output.

    Attributes:
        tensors: The adapter's tensors, each with the change that it is part of.
        config: The content of its adapter_config.json.
        whole: Changed tensors that are saved whole, and their names in the adapter.
        notes: Notes for the user.
    """

    tensors: tuple[tuple[TensorChange, StoredTensor], ...]
    config: bytes
    whole: tuple[tuple[TensorChange, str], ...]
    notes: tuple[str, ...]


def as_adapter(recipe: Recipe, models: Sequence[Checkpoint], changes: Sequence[TensorChange]) -> AdapterOutput:
    """The adapter for a merge: A and B of each changed weight, and other changed tensors whole.

    Args:
        recipe: The recipe.
        models: The models in order, then the base.
        changes: The changed tensors, in the base's order.

    Raises:
        MismatchError: If an adapter cannot represent a change, or nothing changes.
        RecipeError: If the result is not a low-rank product, and ``lora_rank`` is not given.
    """
    return _Output(recipe, models).made_of(changes)


@dataclass
class _Output:
    recipe: Recipe
    models: Sequence[Checkpoint]
    ranks: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    tensors: list[tuple[TensorChange, StoredTensor]] = field(default_factory=list)
    as_they_are: list[tuple[TensorChange, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    biases: list[tuple[TensorChange, str]] = field(default_factory=list)

    def made_of(self, changes: Sequence[TensorChange]) -> AdapterOutput:
        self._shared = Shared(self.recipe.on_nonfinite == "error", Recent(most=RUN))
        self._errors: dict[str, float] = {}
        self._adapters = [model for model in self.models if isinstance(model, Adapter)]
        self._transposed = any(adapter.transposed for adapter in self._adapters)
        self._selection = Selection(self.recipe)
        for change in changes:
            self.tensors += ((change, tensor) for tensor in self._convert(change))
        self._add_biases()
        if self.impossible:
            raise MismatchError(
                "A PEFT adapter cannot hold what changes in\n"
                + "\n".join(f"  {group}" for group in group_names(self.impossible)),
                "Merge into the base instead: leave output_format out. Or leave them out: --lora_skip_whole.",
            )
        if not self.tensors and not self.as_they_are:
            raise MismatchError("No model changes any tensor of the base, so that there is no adapter to save")
        notes = (*self._selection.notes(), *self.notes)
        return AdapterOutput(
            tuple(_in_runs(self.tensors)), self._config(self.models[-1]), tuple(self.as_they_are), notes
        )

    def _convert(self, change: TensorChange) -> Iterator[StoredTensor]:
        name, sources, base, method, *_ = change
        layer, _, parameter = name.rpartition(".")
        module = next((each.modules[name] for each in self._adapters if name in each.modules), layer)
        if not self._selection.takes(module, name):
            return
        if base.size and self._selection.saves_whole(module, name, change.sources, base):
            self.as_they_are.append((change, f"{PEFT_PREFIX}{module}.{parameter}"))
            if module not in self.whole:
                self.whole.append(module)
            if name.endswith(TOKENS) and change.sources[0].shape != base.shape:
                self.notes.append(_of_rows(name, change.sources[0].shape[0]))
        elif parameter == "weight" and len(base.shape) == 2 and base.size:
            yield from self._factors(module, change)
        elif self.recipe.lora_skip_whole:
            self._selection.skipped.append(name)
        elif parameter == "bias" and len(base.shape) == 1:
            self.biases.append((change, module))
        elif parameter == "weight" and len(base.shape) == 1:
            self.whole.append(module)
            dtype = difference_type(*sources, base)
            yield WholeTensor(
                f"{PEFT_PREFIX}{module}.weight", dtype, base.shape, base.file, 0, name, (*sources, base),
                method, self._shared,
            )  # fmt: skip
        else:
            self.impossible.append(name)

    def _add_biases(self) -> None:
        """Biases as they will be; of a module with factors, PEFT has the base's layer inside."""
        for change, module in self.biases:
            inside = "base_layer." if module in self.ranks else ""
            self.as_they_are.append((change, f"{PEFT_PREFIX}{module}.{inside}bias"))

    @property
    def _trained_biases(self) -> str:
        """Which biases PEFT is to load: those beside factors, or any."""
        loose = [module for _, module in self.biases if module not in self.whole]
        return "none" if not loose else "lora_only" if all(module in self.ranks for module in loose) else "all"

    def _factors(self, module: str, change: TensorChange) -> Iterator[StoredTensor]:
        name, sources, base, method, drawn_as, matrices = change
        sources = tuple(difference(each, base) for each in sources)
        embedding = name.endswith(EMBEDDINGS)
        out_first = not embedding and not self._transposed
        outputs, inputs = base.shape if out_first else base.shape[::-1]
        rank, in_core = _exact_rank(sources, base, method), False
        if rank is None and fits_core(sources, base, method, matrices):
            in_core, rank = True, min(products_rank(sources, base) or 0, outputs, inputs)
        wanted = self.recipe.lora_rank
        exact = rank is not None and (wanted is None or rank <= wanted) and not self.recipe.lora_epsilon
        if not exact:
            if wanted is None:
                raise RecipeError(
                    f"What is merged into {name} is no product of the adapters' factors, and has to be cut to a rank",
                    "Give --lora_rank; the report then tells the error of each tensor.",
                )
            rank = min(wanted, outputs, inputs)
        assert rank is not None
        factoring = Factoring(
            drawn_as or name, sources, method, None if exact else rank, in_core, out_first, matrices,
            self._shared, self._errors, distributes=self.recipe.lora_distribute_scale,
        )  # fmt: skip
        if self.recipe.lora_epsilon and not exact:
            rank = factoring.larger_than(self.recipe.lora_epsilon)
            if not rank:
                self._selection.small.append(name)
                return
            factoring = replace(factoring, kept=rank)
        self.ranks[module] = rank
        dtype = difference_type(*sources)
        form = f"{PEFT_PREFIX}{module}.lora_" + ("embedding_{}" if embedding else "{}.weight")
        yield FactorTensor(form.format("A"), dtype, (rank, inputs), base.file, 0, factoring, "A")
        yield FactorTensor(form.format("B"), dtype, (outputs, rank), base.file, 0, factoring, "B")

    def _config(self, base: Checkpoint) -> bytes:
        usual = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 1
        others = {module: rank for module, rank in self.ranks.items() if rank != usual}
        architectures = base.config.get("architectures")
        causal = isinstance(architectures, list) and str(next(iter(architectures), "")).endswith("ForCausalLM")
        named_base = self.recipe.base_model_path
        named = {"base_model_name_or_path": str(named_base)}
        if isinstance(named_base, HubName):
            named = {"base_model_name_or_path": named_base.name, "revision": named_base.revision or "main"}
        config: Mapping[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            **named,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(self.ranks),
            "modules_to_save": self.whole or None,
            "fan_in_fan_out": self._transposed and base.config.get("source") != "paddle",
            "lora_dropout": 0.0,
            "bias": self._trained_biases,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _of_rows(name: str, rows: int) -> str:
    return f"{name} has {rows:,} rows, not the base's: before the adapter is loaded, resize_token_embeddings({rows})."


def _exact_rank(sources: Sequence[StoredTensor], base: StoredTensor, method: Applied) -> int | None:
    """The rank of all products side by side, None if the merged difference is no sum of products."""
    return None if method.coefficients is None else products_rank(sources, base)


def _in_runs(tensors: Sequence[tuple[TensorChange, StoredTensor]]) -> Iterator[tuple[TensorChange, StoredTensor]]:
    parts = [[each for each in tensors if getattr(each[1], "part", None) == part] for part in ("A", "B", None)]
    for begin in range(0, len(parts[0]), RUN):
        yield from parts[0][begin : begin + RUN]
        yield from parts[1][begin : begin + RUN]
    yield from parts[2]

"""Read an adapter's adapter_config.json (PEFT) or lora_config.json (Paddle); refuse unsupported kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.adapters.adapter import PEFT_CONFIG
from modelfuse.checkpoints.adapters.module_numbers import ByPattern
from modelfuse.checkpoints.tensor_names import HEADS
from modelfuse.errors import CheckpointError
from modelfuse.storage import PathOrUrl

#: PEFT settings whose adapters are not base + scale·B·A, and their descriptions.
PEFT_KINDS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens only",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's parallel layers",
}
#: The same for Paddle.
PADDLE_KINDS = {
    "loraga": "LoRA-GA, which changes the base",
    "pissa": "PiSSA, which changes the base",
    "do_qat": "quantization-aware training",
    "enable_lora_list": "LoRA on some parts of a merged layer (enable_lora_list)",
    "lora_use_mixer": "MoSLoRA (lora_use_mixer)",
    "use_mora": "MoRA",
    "nola": "NoLA",
}
#: Initializations that leave the base unchanged; the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) subtract from it.
HARMLESS_STARTS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")

#: The largest alpha: about the largest float32.
MOST_ALPHA = 3e38
SUPPORTED = "Supported are LoRA, rsLoRA and DoRA, LoHa, LoKr, IA³ and trainable tokens."


class Kind(NamedTuple):
    """A kind of adapter that PEFT writes.

    Attributes:
        name: Its name.
        alpha: The name of its alpha setting, if it has one.
        modules: The kinds of its layers, as determined by their tensors' names.
    """

    name: str
    alpha: str | None
    modules: tuple[str, ...]


LORA = Kind("LORA", "lora_alpha", ("lora", "tokens"))
KINDS = {
    each.name: each
    for each in (
        LORA,
        Kind("LOHA", "alpha", ("hada",)),
        Kind("LOKR", "alpha", ("lokr",)),
        Kind("IA3", None, ("ia3",)),
        Kind("TRAINABLE_TOKENS", None, ("tokens",)),
    )
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """An adapter's configuration.

    Attributes:
        kind: The library of the adapter.
        file: The configuration file.
        rank: The rank of most modules.
        alpha: The alpha of most modules.
        rank_pattern: Ranks of other modules.
        alpha_pattern: Alphas of other modules.
        root_scaled: Whether the scale is alpha/√rank (rsLoRA) instead of alpha/rank.
        transposed: Whether the base stores these weights as [in, out] (``fan_in_fan_out``).
        trains_biases: Whether biases were trained, so that the adapter's replace the base's.
        parameters: Suffixes of the names of parameters with factors of their own, such as stacked experts.
        adapts: PEFT's kind of the adapter.
        task: PEFT's task type, such as ``SEQ_CLS``.
        tokens: Trained rows of embeddings, by the suffix of the layer's name; "" is any layer.
    """

    kind: Literal["peft", "paddle"]
    file: PathOrUrl
    rank: int
    alpha: float
    rank_pattern: ByPattern
    alpha_pattern: ByPattern
    root_scaled: bool
    transposed: bool
    trains_biases: bool
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    adapts: Kind = LORA
    task: str = ""

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return int(self.rank_pattern.of(module, self.rank))

    def scale_of(self, module: str) -> float:
        """The scale of B·A of one module."""
        rank = self.rank_of(module)
        return self.alpha_pattern.of(module, self.alpha) / (math.sqrt(rank) if self.root_scaled else rank)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The trained rows of an embedding, and of a head that is tied to it."""
        found = [rows for key, rows in self.tokens.items() if f".{module}".endswith(f".{key}" if key else "")]
        if not found and f"{module}.weight".endswith(HEADS) and len(self.tokens) == 1:
            found = [*self.tokens.values()]
        return found[0] if found else ()


def read_settings(file: PathOrUrl) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
        CheckpointError: If it is malformed, or the adapter is of an unsupported kind.
    """
    content = read_json(file)
    return _peft(file, content) if file.name == PEFT_CONFIG else _paddle(file, content)


def _peft(file: PathOrUrl, content: Mapping[str, object]) -> AdapterConfig:
    kind = content.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _unsupported(file, f"peft_type {kind}")
    _refuse(file, content, PEFT_KINDS)
    start = content.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise CheckpointError(
            f"{file}: this kind of adapter is not supported: init_lora_weights {start!r}, whose base is not the model "
            "it was trained from",
            "PEFT makes a LoRA of that model of it: save_pretrained with path_initial_model_for_weight_conversion.",
        )
    read, own = _Values(file, content), KINDS[str(kind)]
    return AdapterConfig(
        "peft",
        file,
        read.rank(),
        read.number(own.alpha, 8) if own.alpha else 1.0,
        read.pattern("rank_pattern", whole=True),
        read.pattern("alpha_pattern"),
        read.switch("use_rslora"),
        read.switch("fan_in_fan_out"),
        content.get("bias", "none") not in ("none", None),
        read.words("target_parameters"),
        read.rows("token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"),
        own,
        str(content.get("task_type") or ""),
    )


def _paddle(file: PathOrUrl, content: Mapping[str, object]) -> AdapterConfig:
    _refuse(file, content, PADDLE_KINDS)
    read = _Values(file, content)
    return AdapterConfig(
        "paddle",
        file,
        read.rank(),
        read.number("lora_alpha", 8),
        ByPattern(file, "rank_pattern", {}),
        ByPattern(file, "alpha_pattern", {}),
        read.switch("rslora"),
        False,
        bool(content.get("trainable_bias")),
    )


def _refuse(file: PathOrUrl, content: Mapping[str, object], kinds: Mapping[str, str]) -> None:
    for key, words in kinds.items():
        if content.get(key):
            raise _unsupported(file, words)


def _unsupported(file: PathOrUrl, words: str) -> CheckpointError:
    return CheckpointError(f"{file}: this kind of adapter is not supported: {words}", SUPPORTED)


class _Values:
    """Reads settings and checks their types."""

    def __init__(self, file: PathOrUrl, content: Mapping[str, object]) -> None:
        self._file, self._content = file, content

    def rank(self) -> int:
        value = self._content.get("r", 8)
        if type(value) is not int or value < 1:
            raise self._wrong("r", value)
        return value

    def number(self, key: str, usual: float) -> float:
        return self._number(key, self._content.get(key, usual))

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST_ALPHA:
            raise self._wrong(key, value)
        return float(value)

    def switch(self, key: str) -> bool:
        value = self._content.get(key, False)
        if not isinstance(value, bool | None):
            raise self._wrong(key, value)
        return bool(value)

    def words(self, key: str) -> tuple[str, ...]:
        found = self._content.get(key) or ()
        if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
            raise self._wrong(key, found)
        return tuple(found)

    def rows(self, key: str) -> dict[str, tuple[int, ...]]:
        found = self._content.get(key) or {}
        parts = found if isinstance(found, dict) else {"": found}
        rows: dict[str, tuple[int, ...]] = {}
        for name, listed in parts.items():
            if not isinstance(listed, list) or not all(type(row) is int and row >= 0 for row in listed):
                raise self._wrong(key, found)
            if len(set(listed)) < len(listed):
                raise self._wrong(key, found)
            rows[str(name)] = tuple(listed)
        return rows

    def pattern(self, key: str, whole: bool = False) -> ByPattern:
        found = self._content.get(key) or {}
        if not isinstance(found, dict):
            raise self._wrong(key, found)
        values: dict[str, float] = {}
        for name, value in found.items():
            number = self._number(f"{key}.{name}", value)
            if whole and (number < 1 or number != int(number)):
                raise self._wrong(f"{key}.{name}", value)
            values[name] = number
        return ByPattern(self._file, key, values)

    def _wrong(self, key: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self._file}: {key} is {value!r}, which is no value that it can have")

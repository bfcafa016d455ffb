"""The two worlds' layouts as tables: which weights are stored transposed, under which names, and fused or not.

Hugging Face stores the weights of Linear layers as [out, in], Paddle as [in, out]. Sources: what PaddleFormers 1.2
states of each of its models (``paddleformers.py``; ``model.`` names, lm_head as [vocab, hidden]) and their forward
passes; ``_get_name_mappings`` of PaddleNLP 2 and 3 (``llama.`` names, lm_head as [hidden, vocab]).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from msgspec import Struct

from modelfuse.checkpoints import Checkpoint
from modelfuse.checkpoints.layouts.paddleformers import ARCHITECTURES, Stated, layout_of_names, stated
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, POSITION_EMBEDDINGS, TIED_HEADS, TOKEN_EMBEDDINGS

Kind = Literal["hf", "paddle"]
#: How people call them.
WORDS: Mapping[Kind, str] = {"hf": "Hugging Face's layout, [out, in]", "paddle": "Paddle's layout, [in, out]"}

#: Linear layers, and which side of them has the model's width: the inputs, the outputs, or neither.
LINEAR: Mapping[str, str | None] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "in"),
    **dict.fromkeys(("gate_proj", "up_proj", "up_gate_proj", "gate_up_fused_proj", "gate_up_proj"), "in"),
    **dict.fromkeys(("o_proj", "down_proj"), "out"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "in"),
    **dict.fromkeys(("q_b_proj", "kv_b_proj"), None),
}
#: What is [entries, width] in both.
EMBEDDING_MODULES = (*TOKEN_EMBEDDINGS, *POSITION_EMBEDDINGS)
HEAD = TIED_HEADS[0]
HF_PREFIX = "model."


class Fusion(NamedTuple):
    """Layers that some models keep as one: the outputs of its parts, interleaved by group.

    Attributes:
        parts: The single layers, in order.
        names: What the one is called.
        by_head: Whether each key-value head has its queries, its keys and its values together, as the forward
            pass reads them; otherwise the parts follow one another.
    """

    parts: tuple[str, ...]
    names: tuple[str, ...]
    by_head: bool


FUSIONS = (
    Fusion(("q_proj", "k_proj", "v_proj"), ("qkv_proj",), by_head=True),
    Fusion(("gate_proj", "up_proj"), ("up_gate_proj", "gate_up_fused_proj", "gate_up_proj"), by_head=False),
)
FUSED = {name: fusion for fusion in FUSIONS for name in fusion.names}
PARTS = {part: fusion for fusion in FUSIONS for part in fusion.parts}

#: Architectures whose decoder is called like them by Hugging Face, too.
NAMED_ALIKE = ("gpt_neox", "biogpt")


class Layout(Struct, frozen=True):
    """How one checkpoint is stored.

    Attributes:
        kind: Whether Linear weights are [out, in] or [in, out].
        prefix: What the decoder's names begin with: ``model.``, or ``llama.`` in PaddleNLP.
        head: The kind in which ``lm_head.weight`` is stored.
        fused: Names of fused layers that are in use, of those that can be taken apart.
        stated: What PaddleFormers states of the weights, where the kind is its, and it knows the architecture.
    """

    kind: Kind
    prefix: str = HF_PREFIX
    head: Kind = "hf"
    fused: frozenset[str] = frozenset()
    stated: Stated | None = None

    def ours(self, name: str) -> str:
        """A name in the file as Hugging Face has it."""
        name = f"{HF_PREFIX}{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name
        return name if self.stated is None else self.stated.in_hugging_face(name)

    def theirs(self, name: str) -> str:
        """Hugging Face's name as the file has it."""
        name = name if self.stated is None else self.stated.in_paddle(name)
        return f"{self.prefix}{name.removeprefix(HF_PREFIX)}" if name.startswith(HF_PREFIX) else name


class Geometry(NamedTuple):
    """What config.json says of a model: its architecture and sizes, None where it says nothing."""

    architecture: str | None
    hidden: int | None
    heads: int | None
    key_value_heads: int | None
    layers: int | None = None


def module_of(name: str) -> str:
    """The layer that a parameter belongs to.

    >>> module_of("model.layers.0.mlp.up_proj.weight")
    'up_proj'
    """
    return name.split(".")[-2] if "." in name else ""


def geometry_of(models: Iterable[Checkpoint]) -> Geometry:
    """What the first config.json says that says anything."""
    config = next((model.config for model in models if model.config), {})
    text, architecture = config.get("text_config"), config.get("model_type")
    config = {**config, **text} if isinstance(text, Mapping) else config

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int and value > 0 else None

    architecture = architecture if architecture in ARCHITECTURES else config.get("model_type")
    heads = number("num_attention_heads")
    return Geometry(
        architecture if isinstance(architecture, str) else None,
        number("hidden_size"),
        heads,
        number("num_key_value_heads") or heads,
        number("num_hidden_layers"),
    )


def prefix_of(names: Iterable[str], architecture: str | None) -> str:
    """What the decoder's names begin with: PaddleNLP uses the architecture's name where others have ``model``."""
    starts = {".".join(name.split(".", 2)[:2]) for name in names}
    own = () if architecture in NAMED_ALIKE else (architecture,)
    for word in filter(None, (*own, *ARCHITECTURES)):
        if starts & {f"{word}.layers", f"{word}.embed_tokens"}:
            return f"{word}."
    return HF_PREFIX


def layout_of(model: Checkpoint, kind: Kind, geometry: Geometry) -> Layout:
    """The layout of a checkpoint of a known kind."""
    names, architecture = [*model, *model.aliases], geometry.architecture
    prefix = prefix_of(names, architecture)
    fused = {module_of(name) for name in names} & FUSED.keys() if architecture in ARCHITECTURES else set()
    known = stated(architecture, geometry.layers, layout_of_names(architecture, names)) if kind == "paddle" else None
    return Layout(kind, prefix, _kind_of_head(model, prefix), frozenset(fused), known)


def _kind_of_head(model: Checkpoint, prefix: str) -> Kind:
    """How ``lm_head.weight`` is stored: told from the embedding, which is [vocab, hidden] in both."""
    head, embedding = model.get(f"{HEAD}.weight"), model.get(f"{prefix}{EMBEDDINGS[0]}")
    if head is not None and embedding is not None and embedding.shape != embedding.shape[::-1]:
        if head.shape == embedding.shape:
            return "hf"
        if head.shape == embedding.shape[::-1]:
            return "paddle"
    # PaddleNLP keeps it so too where it is tied to the embedding.
    return "hf" if prefix == HF_PREFIX or model.config.get("tie_word_embeddings") is True else "paddle"


def usual_layout(kind: Kind, geometry: Geometry) -> Layout:
    """The layout of a kind that transformers or PaddleFormers load."""
    known = stated(geometry.architecture, geometry.layers) if kind == "paddle" else None
    return Layout(kind, fused=known.fused if known is not None else frozenset(), stated=known)

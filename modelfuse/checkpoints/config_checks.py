"""Check config.json against the shapes of the tensors, as a loader would.

Architectures differ, so only what cannot be meant is a problem: numbers that the decoder of a usual name
(``….embed_tokens.weight``, ``….layers.N.…``) contradicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from modelfuse.checkpoints import CONFIG_FILE
from modelfuse.checkpoints.tensor_names import EMBEDDINGS, HEADS

Shapes = Mapping[str, tuple[int, ...]]
#: The tensor, if it is about one, and what is wrong in words.
Contradiction = tuple[str | None, str]
#: A setting of config.json, if it is a whole number.
Number = Callable[[str], int | None]
#: What makes embeddings of another width than the model's.
OTHER_WIDTHS = ("word_embed_proj_dim", "embedding_size")


def contradictions(config: Mapping[str, object], shapes: Shapes) -> Iterator[Contradiction]:
    """Find contradictions between config.json and the shapes.

    >>> list(contradictions({"vocab_size": 5}, {"model.embed_tokens.weight": (4, 2)}))
    [('model.embed_tokens.weight', 'config.json: vocab_size is 5, but model.embed_tokens.weight is [4, 2]')]

    Args:
        config: The contents of config.json.
        shapes: The shape of every tensor by name.

    Yields:
        Each contradiction.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    embeddings = [name for name in shapes if name.split(".")[-2:] == EMBEDDINGS[0].split(".")]
    if len(embeddings) != 1 or config.get("is_encoder_decoder"):
        return
    number = _reader(config)
    prefix = embeddings[0].removesuffix(EMBEDDINGS[0])
    yield from _check_embedding(embeddings[0], shapes[embeddings[0]], number)
    head = HEADS[0]
    if head in shapes:  # Paddle's tools store it transposed.
        yield from _check_either(head, shapes[head], "vocab_size", number("vocab_size"))
    yield from _check_layers(prefix, shapes, number)
    yield from _check_width(prefix, shapes, number("intermediate_size"))


def _reader(config: Mapping[str, object]) -> Number:
    def number(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int else None

    return number


def _check_embedding(name: str, shape: tuple[int, ...], number: Number) -> Iterator[Contradiction]:
    widths = "hidden_size" if all(number(key) is None for key in OTHER_WIDTHS) else ""
    for key, length in zip(("vocab_size", widths), shape, strict=False):
        wanted = number(key)
        if wanted is not None and wanted != length:
            yield name, _words(key, wanted, name, shape)


def _check_either(name: str, shape: tuple[int, ...], key: str, wanted: int | None) -> Iterator[Contradiction]:
    if wanted is not None and wanted not in shape:
        yield name, _words(key, wanted, name, shape)


def _check_layers(prefix: str, shapes: Shapes, number: Number) -> Iterator[Contradiction]:
    wanted = number("num_hidden_layers")
    form = re.compile(rf"{re.escape(prefix)}layers\.(\d+)\.")
    layers: dict[int, str] = {}
    for name in shapes:
        if match := form.match(name):
            layers.setdefault(int(match[1]), name)
    if wanted is None or not layers:
        return
    absent = wanted - sum(layer < wanted for layer in layers)
    if absent > 0:
        among = f"{prefix}layers.0 to {prefix}layers.{wanted - 1}"
        yield None, f"{CONFIG_FILE}: num_hidden_layers is {wanted}, but {absent} of {among} have no tensors"
    # Layers that predict further tokens come after the others.
    most = wanted + (number("num_nextn_predict_layers") or 0)
    if max(layers) >= most:
        yield layers[max(layers)], f"{CONFIG_FILE}: num_hidden_layers is {wanted}, but there is {layers[max(layers)]}"


def _check_width(prefix: str, shapes: Shapes, wanted: int | None) -> Iterator[Contradiction]:
    """Some models have layers of several widths, none only layers of another width than they say."""
    form = re.compile(rf"{re.escape(prefix)}layers\.\d+\.mlp\.(up|down|gate)_proj\.weight")
    found = {name: shape for name, shape in shapes.items() if form.fullmatch(name)}
    if wanted is None or not found or any(wanted in shape for shape in found.values()):
        return
    name, shape = next(iter(found.items()))
    yield name, _words("intermediate_size", wanted, name, shape)


def _words(key: str, wanted: int, name: str, shape: tuple[int, ...]) -> str:
    return f"{CONFIG_FILE}: {key} is {wanted}, but {name} is {list(shape)}"

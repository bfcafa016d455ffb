"""Run a model on texts, and collect Gram matrices XᵀX of its layers' inputs for regmean (arXiv:2212.09849)."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from msgspec import convert

from modelfuse.checkpoints.input_grams import frame_of
from modelfuse.checkpoints.tensors import Frame
from modelfuse.errors import CheckpointError, OutputError, RecipeError
from modelfuse.inspection.seen_inputs import SeenInputs
from modelfuse.planning.optional_packages import require
from modelfuse.recipe.hub_names import HubName
from modelfuse.recipe.schema import read_input
from modelfuse.recipe.sizes import parse_bytes, size

#: At most one SHARE-th of all tokens is taken from one text, so that several are read, but at least LEAST tokens.
SHARE, LEAST = 4, 32
#: Keys of a JSON line that may hold its text; the first that is there counts.
KEYS = ("text", "content", "prompt")
#: The most memory for Gram matrices.
MEMORY = "8GB"


@dataclass(frozen=True)
class Collected:
    """The result of :func:`collect`.

    Attributes:
        output: The file that was written.
        modules: The number of modules with a Gram matrix.
        tokens: The number of tokens that the model was run on.
    """

    output: Path
    modules: int
    tokens: int


def collect(
    model: str | Path,
    data: str | Path | Sequence[str],
    output: str | Path,
    *,
    tokens: int = 512,
    device: str = "cpu",
    memory: int | str = MEMORY,
    overwrite: bool = False,
) -> Collected:
    """Run a model on some texts of its task, and write the Gram matrices of its layers' inputs as a safetensors file.

    Args:
        model: A folder in the format of transformers, an adapter's folder if its base is available, or a hub name.
        data: A file of texts, JSON lines or plain text; or the texts.
        output: The file to write.
        tokens: The number of tokens to run the model on.
        device: ``cpu`` or ``gpu``.
        memory: The most bytes of Gram matrices in memory, beside the model, or a size such as ``8GB``; the texts are
            run through the model once for each part of the layers that fits.
        overwrite: Whether to replace an existing file.

    Raises:
        ModelfuseError: If a library, the model or the texts are missing, or the output exists and is not to be
            replaced.
    """
    most = _bytes_of(memory)
    if tokens < 1:
        raise RecipeError(f"tokens is {tokens}; it should be at least 1", "The default, 512, is enough.")
    output = Path(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists", "Name another file, or add --overwrite.")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"There is no folder {output.absolute().parent}", "Make it, or name another file.")
    if not isinstance(read_input(str(model)), HubName) and not Path(model).is_dir():
        raise CheckpointError(f"There is no folder {model}", "Name a model's folder, or a hub name: org/model.")
    texts = read_texts(Path(data)) if isinstance(data, str | Path) else [*data]
    for module in ("torch", "transformers"):
        require(module, "collect", "have another machine collect", extra="calibrate")
    torch, transformers = import_module("torch"), import_module("transformers")
    with _quiet(transformers):
        rows = _tokens(transformers, str(model), texts, tokens)
        running = _load(torch, transformers, str(model), device)
        seen = SeenInputs(torch, running)

        def read(**how: Any) -> None:
            with seen.watching(**how):
                for row in rows:
                    numbers = torch.tensor([row], device=running.device)
                    more = {"decoder_input_ids": numbers} if running.config.is_encoder_decoder else {}
                    running(input_ids=numbers, **more)

        name = Path(model).absolute().name if Path(model).exists() else str(model)
        count = sum(map(len, rows))
        _sum_and_write(seen, read, output, most, partial(frame_of, model=name, tokens=count))
    return Collected(output, len(seen.shapes), count)


def _bytes_of(memory: int | str) -> int:
    try:
        return convert(parse_bytes(memory), int)
    except ValueError as error:
        raise RecipeError(f"memory is {memory!r}: {error}", "Give a size such as 8GB.") from None


def _sum_and_write(
    seen: SeenInputs, read: Callable[..., None], output: Path, most: int, frame_of: Callable[..., Frame]
) -> None:
    """Run the model once to see its modules, then for each part of them, and write the parts' Gram matrices."""
    read(sums=False)
    aliases = seen.aliases
    shapes = {name: shape for name, shape in seen.shapes.items() if name not in aliases}
    parts = split(shapes, most)
    frame = frame_of([(name, shape[shape[0] == 1 :]) for name, shape in shapes.items()], aliases=aliases)
    offsets = dict(zip(shapes, frame.offsets, strict=True))
    with _replacing(output) as file:
        for start, piece in frame.pieces:
            file.seek(start)
            file.write(piece)
        for part in parts:
            read(names=part)
            for name in part:
                file.seek(offsets[name])
                file.write(seen.grams.pop(name).cpu().numpy().astype("<f4").tobytes())


def split(shapes: Mapping[str, tuple[int, ...]], most: int) -> list[list[str]]:
    """Modules in parts, in order, whose Gram matrices take at most so many bytes.

    Raises:
        RecipeError: If a single one takes more.
    """
    parts, filled = list[list[str]](), most
    for name, shape in shapes.items():
        needed = 4 * math.prod(shape)
        if needed > most:
            raise RecipeError(
                f"memory is {size(most)}, but the Gram matrix of {name}'s inputs takes {size(needed)}",
                f"Give at least {size(needed)}.",
            )
        if filled + needed > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += needed
    return parts


def read_texts(path: Path) -> list[str | list[dict[str, Any]]]:
    """The texts of a file: one per JSON line, or the whole of any other file. Conversations are lists of messages.

    Raises:
        RecipeError: If the file cannot be read, a line is invalid, or there is no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "Name a file of texts with --data.") from None
    texts = [*_lines(path, content)] if path.suffix in (".jsonl", ".json", ".ndjson") else [content]
    if not any(texts):
        raise RecipeError(f"{path} holds no text", 'Give lines such as {"text": "…"}.')
    return [text for text in texts if text]


def _lines(path: Path, content: str) -> Iterator[Any]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path}, line {number}: {error}", "Give one JSON value a line.") from None
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            yield value["messages"]
            continue
        text = value if isinstance(value, str) else None
        if isinstance(value, dict):
            text = next((value[key] for key in KEYS if isinstance(value.get(key), str)), None)
        if text is None:
            raise RecipeError(f"{path}, line {number}: there is no text", 'Give lines such as {"text": "…"}.')
        yield text


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress the library's progress bars and its warnings about versions."""
    logging = transformers.utils.logging
    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _load(torch: Any, transformers: Any, model: str, device: str) -> Any:
    """The model as an instance of the class that config.json names, so that its modules have the checkpoint's names."""
    if device == "gpu" and not torch.cuda.is_available():
        raise RecipeError("device is gpu, but torch finds none", "Use --device cpu.")
    adapter = Path(model, "adapter_config.json").is_file()
    if adapter:
        require("peft", "collect from an adapter", "merge it into its base first", extra="calibrate")
    try:
        if adapter:
            kind = transformers.AutoModelForCausalLM
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            names = [*(config.architectures or ()), "AutoModel"]
            kind = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
        dtype = torch.float32 if device == "cpu" else "auto"
        # Products of several experts at once cannot be intercepted, so each is to be multiplied by itself.
        running = kind.from_pretrained(model, dtype=dtype, experts_implementation="eager")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers cannot open {model}: {error}", "Name a model's folder.") from error
    return running.eval().to("cuda" if device == "gpu" else "cpu")


def _tokens(transformers: Any, model: str, texts: Sequence[Any], most: int) -> list[list[int]]:
    """Token ids of the beginnings of texts, ``most`` in all."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{model} has no tokenizer that transformers can open: {error}") from error
    rows: list[list[int]] = []
    left, each = most, max(most // SHARE, LEAST)
    for text in texts:
        if not isinstance(text, str) and getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(text, tokenize=False)
        elif not isinstance(text, str):
            text = "\n".join(str(message.get("content", "")) for message in text)
        row = tokenizer(text)["input_ids"][: min(each, left)]
        if row:
            rows.append([*row])
            left -= len(row)
        if left <= 0:
            break
    if not rows:
        raise RecipeError("The texts have no tokens", "Give texts that the model was trained for.")
    return rows


@contextmanager
def _replacing(output: Path) -> Iterator[IO[bytes]]:
    """A temporary file, which becomes the output if all goes well."""
    try:
        with tempfile.NamedTemporaryFile(dir=output.absolute().parent, prefix=f".{output.name}.", delete=False) as file:
            try:
                yield file
                file.close()
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, output)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The evaluation that is built in: how well a language model predicts some texts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from modelfuse.errors import EvaluationError, RecipeError
from modelfuse.planning.optional_packages import need
from modelfuse.tuning.evaluation import Numbers

NAME = "perplexity"
#: Tokens of a text that are looked at; longer ones are cut into pieces of as many.
MOST_TOKENS = 1024
#: The extra that installs what it needs.
EXTRA = "transformers"


class Perplexity:
    """exp of the mean loss of the next token, of each file of texts.

    Args:
        files: Of texts, one a line: JSON strings or objects with ``text``; any other file is one text.

    Raises:
        RecipeError: If there are none, or they cannot be read.
        MissingExtraError: If torch or transformers is not installed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        for module in ("torch", "transformers"):
            need(module, f"--evaluate {NAME}", "give a command of your own", extra=EXTRA)
        if not files:
            raise RecipeError(
                f"evaluate is {NAME}, but there is nothing to predict", "Name texts with --data texts.jsonl."
            )
        names = [NAME] if len(files) == 1 else [each.stem for each in files]
        if len(set(names)) < len(names):
            raise RecipeError("Two files of data have one name, which their numbers are to have", "Rename one.")
        contents = {name: _content(path) for name, path in zip(names, files, strict=True)}
        self._texts = {
            name: [*texts_in(content, path)] for (name, content), path in zip(contents.items(), files, strict=True)
        }
        digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()
        self.told = f"{NAME} of {', '.join(map(str, files))} (sha256 {digest})"

    def __call__(self, folder: Path) -> Numbers:
        torch, transformers = import_module("torch"), import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EvaluationError(
                f"transformers cannot load the merged model as one that predicts text: {str(error).splitlines()[0]}",
                "Give a command of your own with --evaluate.",
            ) from error
        most = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS)
        with torch.inference_mode():
            return {name: _perplexity(torch, model, tokenizer, texts, most) for name, texts in self._texts.items()}

    def stop(self) -> None:
        """Nothing: it ends soon."""


def texts_in(content: bytes, path: Path) -> Iterator[str]:
    """The texts of a file.

    Raises:
        RecipeError: If a line is not as it should be, or there is none.
    """
    try:
        plain = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text: {error.reason} at byte {error.start}") from None
    if not plain.strip():
        raise RecipeError(f"{path} holds no text")
    if path.suffix not in (".jsonl", ".ndjson"):
        yield plain
        return
    for number, line in enumerate(plain.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise RecipeError(f"{path}, line {number} is no JSON") from None
        text = found.get("text") if isinstance(found, Mapping) else found
        if not isinstance(text, str):
            raise RecipeError(
                f"{path}, line {number} has no text", 'Lines should be like {"text": "Once upon a time"}.'
            )
        yield text


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"data: {path} cannot be read: {error.strerror}") from None


def _perplexity(torch: Any, model: Any, tokenizer: Any, texts: Sequence[str], most: int) -> float:
    whole, count = 0.0, 0
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        for piece in tokens.split(most, dim=1):
            if piece.shape[1] > 1:
                logits = model(input_ids=piece).logits[0, :-1].float()
                whole += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
                count += piece.shape[1] - 1
    if not count:
        raise EvaluationError("The texts have no token that could be predicted", "Give longer ones with --data.")
    mean = whole / count
    return math.exp(mean) if mean < math.log(1e300) else math.inf

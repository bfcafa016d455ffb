"""The built-in evaluation: the perplexity of a language model on some texts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from modelfuse.errors import EvaluationError, RecipeError
from modelfuse.execution.tuning.evaluation import Numbers
from modelfuse.planning.optional_packages import require

NAME = "perplexity"
#: The most tokens per forward pass; longer texts are cut into pieces.
MOST_TOKENS = 1024
#: The logarithm of the largest perplexity; larger ones are infinite.
LARGEST = math.log(1e300)
#: The extra that installs torch and transformers.
EXTRA = "transformers"


class Perplexity:
    """exp of the mean cross-entropy of the next token, for each file of texts.

    Args:
        files: ``.jsonl`` or ``.ndjson`` files with a JSON string or an object with ``text`` in each line; any other
            file is one text.

    Raises:
        RecipeError: If there are no files, or one cannot be read.
        MissingExtraError: If torch or transformers is not installed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        for module in ("torch", "transformers"):
            require(module, f"--evaluate {NAME}", "give a command of your own", extra=EXTRA)
        if not files:
            raise RecipeError(
                f"evaluate is {NAME}, but there is nothing to predict", "Name texts with --data texts.jsonl."
            )
        names = [NAME] if len(files) == 1 else [each.stem for each in files]
        if len(set(names)) < len(names):
            raise RecipeError("Two files of data have the same name, which names their numbers", "Rename one.")
        contents = {name: _content(path) for name, path in zip(names, files, strict=True)}
        self._texts = {
            name: [*texts_in(content, path)] for (name, content), path in zip(contents.items(), files, strict=True)
        }
        digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()
        self.description = f"{NAME} of {', '.join(map(str, files))} (sha256 {digest})"

    @property
    def names(self) -> Sequence[str]:
        """The names of its numbers."""
        return [*self._texts]

    def __call__(self, folder: Path) -> Numbers:
        torch = import_module("torch")
        model, tokenizer, most = self._load(folder, "auto")
        with torch.inference_mode():
            return {
                name: _exp(_loss(torch, model, tokenizer, texts, most, False)) for name, texts in self._texts.items()
            }

    def with_gradients(self, folder: Path) -> tuple[Numbers, dict[str, Any]]:
        """The perplexity of the only file, and the gradient of the mean loss for each parameter: float32 arrays."""
        torch = import_module("torch")
        model, tokenizer, most = self._load(folder, torch.float32)
        ((name, texts),) = self._texts.items()
        loss = _loss(torch, model, tokenizer, texts, most, True)
        found = {
            parameter: each.grad.detach().to("cpu").numpy()
            for parameter, each in model.named_parameters()
            if each.grad is not None
        }
        return {name: _exp(loss)}, found

    def _load(self, folder: Path, dtype: Any) -> tuple[Any, Any, int]:
        """A model, its tokenizer, and the most tokens per forward pass.

        Raises:
            EvaluationError: If transformers cannot load it.
        """
        torch, transformers = import_module("torch"), import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EvaluationError(
                f"transformers cannot load the merged model as a language model: {str(error).splitlines()[0]}",
                "Give a command of your own with --evaluate.",
            ) from error
        limit = getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS
        return model, tokenizer, min(MOST_TOKENS, limit)

    def stop(self) -> None:
        """Do nothing: the evaluation runs to its end."""


def texts_in(content: bytes, path: Path) -> Iterator[str]:
    """The texts of a file.

    Raises:
        RecipeError: If a line is invalid, or the file has no text.
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


def _loss(torch: Any, model: Any, tokenizer: Any, texts: Sequence[str], most: int, backward: bool) -> float:
    """The mean cross-entropy of the next token; with ``backward``, its gradients are left in the parameters."""
    pieces = [
        piece
        for text in texts
        for piece in tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        .to(model.device)
        .split(most, dim=1)
        if piece.shape[1] > 1
    ]
    count, whole = sum(piece.shape[1] - 1 for piece in pieces), 0.0
    if not count:
        raise EvaluationError("The texts have no token that could be predicted", "Give longer ones with --data.")
    for piece in pieces:
        logits = model(input_ids=piece).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum") / count
        if backward:
            loss.backward()
        whole += float(loss.detach())
    return whole


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST else math.inf

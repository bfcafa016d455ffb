"""Generate the table of PaddleFormers' layouts from the statements of its model classes.

    pip install paddlepaddle==3.3.1 paddleformers==1.2.0
    python tools/paddleformers_layouts.py [FILE]

For every architecture, PaddleFormers states how Hugging Face's weights become its own (``_gen_aoa_config``): transposed
("^T") or not, fused or not, and their names. The table has one line per statement, with ``*`` for numbers and ``+`` for
the number of a layer past the last one (a prediction layer), as ``modelfuse/checkpoints/layouts/paddleformers.py``
reads them; vectors that are the same in both are left out. An architecture may have two layouts: that of the plain
models, and that of models built with ``paddlefleet``. It needs a Python with PaddleFormers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fixtures" / "layouts"))

import paddleformers_models as models  # type: ignore[import-not-found]  # noqa: E402

OUT = ROOT / "modelfuse" / "checkpoints" / "layouts" / "paddleformers.json"
#: PaddleFormers' words for parts that are interleaved by heads, and for parts in order.
BY_HEAD, IN_ORDER = ("fused_qkv",), ("fused_ffn", "fused_qkv_old", "axis=1")
#: Settings that add prediction layers and biases, so that models state these, too.
BIASED = {"attention_bias": True}
MORE: dict[str, dict[str, Any]] = {"glm4_moe": {"num_nextn_predict_layers": 1}, "qwen3": BIASED, "qwen3_vl": BIASED}
#: Names of vectors, which are left out if they are the same in both.
VECTOR = re.compile(r".*(?:norm\w*\.(?:\*\.)?weight|\.bias|\.sinks|\.ln_q\.weight)")


def main() -> None:
    """Write the table."""
    table = {kind: layouts for kind in models.NAMES if (layouts := dict(_layouts(kind)))}
    out = Path(sys.argv[1]) if sys.argv[1:] else OUT
    out.write_text(json.dumps({"paddleformers": "1.2.0", "architectures": table}, indent=1) + "\n")


def _layouts(kind: str) -> Iterator[tuple[str, list[str]]]:
    for name, fleet in (("plain", False), ("fleet", True)):
        try:
            config, model = models.classes(kind, fleet)
        except StopIteration:
            continue
        made = models.configured(kind, config)
        for key, value in MORE.get(kind, {}).items():
            setattr(made, key, value)
        past = f"layers.{getattr(made, 'num_hidden_layers', None)}."
        stated = (each.replace(past, "layers.+.") for each in model._gen_aoa_config(made)["aoa_statements"])
        saved = _names_in_files(model)
        lines = (_line(each, saved) for each in stated)
        yield name, list(dict.fromkeys(filter(None, lines)))


def _names_in_files(model: Any) -> Callable[[str], str]:
    """A function from the names of a model's weights in memory to those in files."""
    from paddleformers.transformers.model_utils import VLMS

    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    if not any(word in each.__name__.lower() for each in model.__mro__[:-1] for word in VLMS):
        mapping = {}

    def saved(name: str) -> str:
        for pattern, memory in mapping.items():
            name, found = re.subn(memory, re.sub(r"\(.*\)", "", pattern.lstrip("^")), name)
            if found:
                break
        return name

    return saved


def _line(statement: str, saved: Callable[[str], str]) -> str | None:
    """The line of a statement, with the names in files; None if nothing changes."""
    left, right = (side.split(",") for side in _starred(statement).split("->"))
    sources = [each.strip() for each in left]
    words = [each for each in map(str.strip, right) if "=" in each or each in (*BY_HEAD, *IN_ORDER)]
    targets = [saved(each) for each in map(str.strip, right) if each not in words]
    turned = {each.endswith("^T") for each in sources}
    if len(targets) != 1 or len(turned) != 1 or "_" in (*sources, *targets) or targets == ["lm_head.weight"]:
        _check_other(statement, sources, targets)
        return None
    names = [each.removesuffix("^T") for each in sources]
    if names == targets and not turned.pop():
        return None if VECTOR.fullmatch(names[0]) else names[0]
    line = ", ".join(sources) + ("" if names == targets else f" -> {targets[0]}")
    if len(names) == 1:
        return line
    return f"{line}, {_order(words, statement)}"


def _order(words: list[str], statement: str) -> str:
    if any(each in BY_HEAD for each in words):
        return "by head"
    if any(each in IN_ORDER for each in words):
        return "in order"
    raise ValueError(f"A new way to fuse: {statement}")


def _check_other(statement: str, sources: list[str], targets: list[str]) -> None:
    """Check that a statement without a line concerns a buffer, or the head, which is the same in both."""
    if "_" in (*sources, *targets) or targets == ["lm_head.weight"]:
        return
    raise ValueError(f"A new kind of statement: {statement}")


def _starred(statement: str) -> str:
    return re.sub(r"(?<=\.)(?:\d+|\$[A-Z_]+)(?=\.)", "*", statement)


if __name__ == "__main__":
    main()

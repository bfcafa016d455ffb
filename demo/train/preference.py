"""The preference: a function that says what it does over the same function without its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

Pair = dict[str, str]
COMPLETION = 250  # characters; more than the first tokens that are compared


def pairs(documents: Iterable[str]) -> Iterator[Pair]:
    """One pair for each function in Python sources that has a docstring and more than that."""
    for document in documents:
        lines = document.splitlines()
        for node in ast.walk(ast.parse(document)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                pair = _pair(node, lines)
                if pair:
                    yield pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Pair | None:
    """The head of the function, then its body with and without the docstring; None where it is too short."""
    if len(node.body) < 2 or node.body[0].lineno == node.lineno:
        return None
    docstring = node.body[0]
    head = lines[node.lineno - 1 : docstring.lineno - 1]
    bare = lines[docstring.end_lineno or 0 : node.end_lineno]
    documented = lines[docstring.lineno - 1 : node.end_lineno]
    while bare and not bare[0].strip():
        bare.pop(0)
    # Prompts end before the line break: the break and the indent after it are one token.
    chosen, rejected = ("".join("\n" + line for line in part)[:COMPLETION] for part in (documented, bare))
    if min(len(chosen), len(rejected)) < 80 or len(head) > 8:
        return None
    return {"prompt": "\n".join(head), "chosen": chosen, "rejected": rejected}

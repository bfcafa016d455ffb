"""docs/guarantees.md names tests that exist, and every promise has one."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
#: The promise, and what its row says of tests.
ROWS = [
    (cells[0].strip(), cells[1].strip())
    for line in PAGE.splitlines()
    if line.startswith("| ") and len(cells := line.strip("|").split("|")) == 2 and cells[0].strip() != "promise"
]
NAMED = sorted(set(re.findall(r"`(test_\w+\.py::\w+)`", PAGE)))


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_is_named_exists(name: str) -> None:
    file, test = name.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert test in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_every_promise_has_a_test_or_says_that_it_has_none_yet() -> None:
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.splitlines()) - PAGE.count("| promise | tests |")
    for promise, tests in ROWS:
        assert promise
        assert tests == "in work" or re.fullmatch(r"`test_\w+\.py::\w+`(, `test_\w+\.py::\w+`)*", tests), promise

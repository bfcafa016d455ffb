"""The house as it stands: which module may import which, and how large a file may be."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modelfuse"

#: From the ground up. A module imports what lies below it; inside a package (``methods``, ``kernels``,
#: ``checkpoints``), modules import each other without cycles.
LAYERS: list[set[str]] = [
    {"errors", "dtypes", "version"},
    {"extras"},
    {"methods", "checksums", "scheduler", "journal", "storage"},
    {"kernels", "checkpoints"},
    {"dimensions", "recipe_checks", "layouts", "hub_names", "buffers"},
    {"recipe_values"},
    {"copying", "recipe", "recipe_file", "matching", "layout_signs"},
    {"fp8", "adapters"},
    {"quantized"},
    {"relayout", "serving", "memory", "places"},
    {"inputs", "output_format"},
    {"notes"},
    {"plan"},
    {"hub"},
    {"nonfinite", "suspicious", "unequal"},
    {"report"},
    {"reported", "resuming", "walking"},
    {"streaming", "cluster"},
    {"run", "contents"},
    {"recomputing"},
    {"verification"},
    {"voice"},
    {"api", "show"},
    {"manual"},
    {"cli"},
    {"__main__"},
]
#: ``modelfuse/__init__.py`` names what lies above only for type checkers, and imports it when first used.
LAZY = {"modelfuse"}
#: Packages from outside, and the only modules that may import them.
THIRD_PARTY = {
    "numpy": {
        "methods",
        "kernels",
        "storage",
        "checkpoints",
        "adapters",
        "checksums",
        "copying",
        "report",
        "resuming",
        "walking",
        "nonfinite",
        "fp8",
        "recomputing",
        "verification",
        "cluster",
    },
    "llvmlite": {"kernels"},
    "numba": {"kernels"},
    "msgspec": {"recipe_values", "reported"},
    "huggingface_hub": {"hub"},
    "yaml": {"recipe_file"},
    "fsspec": {"storage"},
    "aiohttp": {"storage"},
    "botocore": {"storage"},
    "rich": {"voice", "show", "manual", "cli"},
    "xxhash": {"checksums", "journal"},
    "ray": {"cluster"},
}
#: Those of them that an extra of the same name installs: imported only where a request needs them.
EXTRAS = {"hub", "ray", "remote", "s3"}
#: What is imported of them, where that is called otherwise: s3fs is used through fsspec, and brings botocore.
DISTRIBUTIONS = {"pyyaml": "yaml", "s3fs": "botocore"}
#: One module, as its functions call each other.
LONGEST = {"modelfuse.kernels.cpu": 510}
MAX_LINES = 310
#: Names that say nothing of what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers", "core", "base"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """All modules that a module imports anywhere in it, for type checkers or when needed included."""
    found: set[str] = set()
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inside
            if len(inside) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def own(module: str) -> set[str]:
    """The modules of the package that it imports."""
    return {each for each in imports(module) if each.split(".")[0] == "modelfuse"}


def room(module: str) -> str:
    """The part of the house: ``checkpoints`` for ``modelfuse.checkpoints.files``."""
    return module.split(".")[1] if "." in module else module


def floor(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_its_layer() -> None:
    rooms = {room(module) for module in FILES} - LAZY
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted(rooms)


@pytest.mark.parametrize("module", sorted(FILES.keys() - LAZY))
def test_no_module_imports_a_higher_one_or_its_neighbour(module: str) -> None:
    for imported in own(module):
        assert imported not in LAZY, f"{module} imports the package itself"
        if room(imported) != room(module):
            assert floor(room(imported)) < floor(room(module)), f"{module} imports {imported}"


def test_there_are_no_cycles() -> None:
    graph = {module: own(module) for module in FILES if module not in LAZY}
    graphlib.TopologicalSorter(graph).prepare()


def test_importing_the_package_loads_next_to_nothing() -> None:
    """Neither numpy nor msgspec nor a compiler, and of the package itself only errors and the version."""
    code = (
        "import sys; before = set(sys.modules); import modelfuse;"
        "print(*sorted({name for name in set(sys.modules) - before}))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if name.startswith("modelfuse")} == {
        "modelfuse", "modelfuse.errors", "modelfuse.version",
    }  # fmt: skip
    assert not {name.split(".")[0] for name in loaded} & THIRD_PARTY.keys()


def third_party(module: str) -> set[str]:
    top = {each.split(".")[0] for each in imports(module)}
    return top - set(sys.stdlib_module_names) - {"modelfuse"}


@pytest.mark.parametrize("module", FILES)
def test_packages_from_outside_are_used_where_they_belong(module: str) -> None:
    """So nothing here needs torch, paddle, safetensors or transformers: checkpoints are read by our own code."""
    for package in third_party(module):
        assert package in THIRD_PARTY, f"{module} imports {package}"
        assert room(module) in THIRD_PARTY[package], f"{module} imports {package}"


def test_compiling_has_one_door() -> None:
    assert [module for module in FILES if "numba" in third_party(module)] == ["modelfuse.kernels.loading"]


def test_dependencies_are_those_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for name in EXTRAS for each in project["optional-dependencies"][name]]
    declared = {re.split(r"[<>=!~\[ ]", each)[0] for each in [*project["dependencies"], *extras]}
    assert {DISTRIBUTIONS.get(name, name) for name in declared} == set().union(*map(third_party, FILES))


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_too_long(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST.get(module, MAX_LINES)


def test_names_say_what_is_inside() -> None:
    assert not [module for module in FILES if module.rsplit(".", 1)[-1] in EMPTY_NAMES]


@pytest.mark.parametrize("module", FILES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    assert text
    assert text.splitlines()[0].endswith((".", ":", "?"))

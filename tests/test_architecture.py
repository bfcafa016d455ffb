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

#: What each package imports, sub-packages by themselves; beside it, only its own modules. ``checkpoints`` is what lies
#: in that folder itself, ``checkpoints.formats`` what lies in the folder in it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": {"printable"},
    "printable": set(),
    "dtypes": set(),
    "version": set(),
    "methods": set(),
    "storage": {"errors", "storage.remote"},
    "storage.local": {"errors", "storage"},
    "storage.remote": {"errors", "storage"},
    "recipe": {"printable", "errors", "dtypes", "storage", "methods", "recipe.arcee"},
    "recipe.arcee": {"errors", "dtypes", "storage", "recipe"},
    "kernels": {"errors", "dtypes", "methods", "kernels.arrays", "kernels.compiled", "kernels.jit"},
    "kernels.arrays": {"errors", "dtypes", "methods", "kernels"},
    "kernels.compiled": {"dtypes", "methods", "kernels", "kernels.arrays", "kernels.jit"},
    "kernels.jit": set(),
    "checkpoints": {"printable", "errors", "dtypes", "storage", "recipe", "checkpoints.formats", "checkpoints.views"},
    "checkpoints.adapters": {
        "errors",
        "dtypes",
        "storage",
        "methods",
        "recipe",
        "kernels",
        "kernels.compiled",
        "checkpoints",
        "checkpoints.formats",
        "checkpoints.layouts",
    },
    "checkpoints.formats": {"errors", "dtypes", "storage", "checkpoints", "checkpoints.views"},
    "checkpoints.layouts": {"errors", "recipe", "checkpoints", "checkpoints.views"},
    "checkpoints.output": {"errors", "storage", "storage.local", "storage.remote", "checkpoints"},
    "checkpoints.vocabulary": {
        "errors",
        "dtypes",
        "storage",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.views",
    },
    "checkpoints.views": {"errors", "dtypes", "storage", "kernels", "kernels.compiled", "checkpoints"},
    "planning": {
        "printable",
        "errors",
        "version",
        "dtypes",
        "storage",
        "methods",
        "recipe",
        "planning.arcee",
        "planning.mixture",
        "kernels",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.formats",
        "checkpoints.layouts",
        "checkpoints.output",
        "checkpoints.vocabulary",
    },
    "planning.arcee": {
        "errors",
        "dtypes",
        "storage",
        "methods",
        "recipe",
        "recipe.arcee",
        "kernels",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.layouts",
        "checkpoints.vocabulary",
        "planning",
    },
    "planning.mixture": {
        "errors",
        "dtypes",
        "storage",
        "methods",
        "recipe",
        "recipe.arcee",
        "kernels",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.vocabulary",
        "planning",
        "planning.arcee",
    },
    "planning.hub": {
        "errors",
        "version",
        "recipe",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.formats",
        "checkpoints.output",
        "planning",
    },
    "execution": {
        "errors",
        "version",
        "storage",
        "storage.local",
        "recipe",
        "kernels",
        "kernels.compiled",
        "kernels.jit",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.output",
        "planning",
        "execution.ray",
    },
    "execution.ray": {
        "printable",
        "errors",
        "version",
        "storage",
        "storage.local",
        "kernels",
        "checkpoints.output",
        "planning",
        "execution",
    },
    "inspection": {
        "printable",
        "errors",
        "dtypes",
        "storage",
        "storage.local",
        "recipe",
        "kernels",
        "kernels.jit",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.formats",
        "checkpoints.layouts",
        "planning",
        "planning.hub",
        "execution",
    },
    "inspection.pictures": {"printable", "errors", "version", "storage", "recipe", "kernels.jit", "inspection"},
    "execution.tuning": {
        "printable",
        "errors",
        "storage",
        "storage.local",
        "recipe",
        "kernels.jit",
        "checkpoints",
        "checkpoints.adapters",
        "checkpoints.output",
        "planning",
        "planning.hub",
        "execution",
    },
    "cli": {
        "printable",
        "errors",
        "dtypes",
        "version",
        "storage",
        "methods",
        "recipe",
        "kernels",
        "kernels.jit",
        "checkpoints",
        "checkpoints.formats",
        "planning",
        "planning.hub",
        "execution",
        "inspection",
        "inspection.pictures",
        "execution.tuning",
    },
    "api": {
        "errors",
        "storage",
        "methods",
        "recipe",
        "kernels.jit",
        "planning",
        "planning.hub",
        "execution",
        "inspection",
        "inspection.pictures",
        "execution.tuning",
        "cli",
    },
    "__main__": {"cli"},
}
#: ``modelfuse/__init__.py`` imports what its functions use when they are called, and names the rest for type checkers.
LAZY = {"modelfuse"}
#: The package from outside that every module may use, for records.
EVERYWHERE = "msgspec"
#: The others, and the only packages here that may import them.
THIRD_PARTY = {
    "numpy": {
        "cli",
        "inspection.pictures",
        "methods",
        "kernels",
        "kernels.arrays",
        "kernels.compiled",
        "kernels.jit",
        "storage",
        "storage.remote",
        "checkpoints.adapters",
        "checkpoints.views",
        "checkpoints.vocabulary",
        "planning.arcee",
        "planning.mixture",
        "execution",
        "execution.ray",
        "inspection",
        "execution.tuning",
    },
    "llvmlite": {"kernels.jit"},
    "numba": {"kernels.jit"},
    "huggingface_hub": {"planning.hub"},
    "yaml": {"recipe"},
    "fsspec": {"storage.remote"},
    "obstore": {"storage.remote"},
    "rich": {"cli"},
    "xxhash": {"storage", "storage.local"},
    "ray": {"execution.ray"},
    "shtab": {"cli"},
    "threadpoolctl": {"kernels"},
    "tokenizers": {"planning.mixture"},
    "torch": {"planning.mixture"},
    "transformers": {"planning.mixture", "checkpoints.vocabulary"},
    "vl_convert": {"inspection.pictures"},
}
#: Those of them that an extra of the same name installs: imported only where a request needs them.
EXTRAS = {"hub", "ray", "remote", "report", "tokenizers", "transformers"}
#: What is imported of them, where that is called otherwise.
DISTRIBUTIONS = {"pyyaml": "yaml", "vl-convert-python": "vl_convert"}
#: One module, as its functions call each other.
LONGEST = {"modelfuse.kernels.compiled.merge_loops": 510}
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


def package_of(module: str) -> str:
    """The package that a module lies in, or what it is itself: ``storage`` for ``modelfuse.storage.files``."""
    names = module.split(".")[1:] if "." in module else [module]
    return ".".join(names if len(names) == 1 or FILES[module].name == "__init__.py" else names[:-1])


def arrows(depth: int) -> dict[str, set[str]]:
    """Which packages import which, with their sub-packages by themselves or, at a depth of 1, as one."""
    found: dict[str, set[str]] = {}
    for module in FILES.keys() - LAZY:
        one, *others = (".".join(package_of(each).split(".")[:depth]) for each in (module, *sorted(own(module) - LAZY)))
        found.setdefault(one, set()).update(each for each in others if each != one)
    return found


def test_every_package_is_in_the_table() -> None:
    assert MAY_IMPORT.keys() == {package_of(module) for module in FILES.keys() - LAZY}


@pytest.mark.parametrize("module", sorted(FILES.keys() - LAZY))
def test_no_module_imports_what_its_package_may_not(module: str) -> None:
    for imported in own(module):
        assert imported not in LAZY, f"{module} imports the package itself"
        if package_of(imported) != package_of(module):
            assert package_of(imported) in MAY_IMPORT[package_of(module)], f"{module} imports {imported}"


def test_the_table_names_no_arrow_that_is_none() -> None:
    assert arrows(depth=2) == MAY_IMPORT


def test_packages_import_one_way() -> None:
    """What a package holds is its own business, as long as modules import each other without cycles, too."""
    graphlib.TopologicalSorter(arrows(depth=1)).prepare()


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
    assert not {name.split(".")[0] for name in loaded} & {EVERYWHERE, *THIRD_PARTY}


def third_party(module: str) -> set[str]:
    top = {each.split(".")[0] for each in imports(module)}
    return top - set(sys.stdlib_module_names) - {"modelfuse"}


@pytest.mark.parametrize("module", FILES)
def test_packages_from_outside_are_used_where_they_belong(module: str) -> None:
    """So nothing here needs paddle or safetensors, and torch and transformers are for running a model alone."""
    for package in third_party(module) - {EVERYWHERE}:
        assert package in THIRD_PARTY, f"{module} imports {package}"
        assert package_of(module) in THIRD_PARTY[package], f"{module} imports {package}"


def test_compiling_has_one_door() -> None:
    assert [module for module in FILES if "numba" in third_party(module)] == ["modelfuse.kernels.jit.compile"]


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

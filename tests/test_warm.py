"""modelfuse warm: kernels compiled ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import call


def warm(*words: str, folder: Path, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **(more or {})}
    command = [sys.executable, "-W", "error", "-m", "modelfuse", "warm", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_is_warmed_is_compiled_before_a_merge(tmp_path: Path) -> None:
    done = warm("task_arithmetic", "ridge", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "compiled 4 of 4"
    assert done.stdout == f"compiled kernels are stored in {tmp_path / 'modelfuse'}\n"
    code = (
        "from modelfuse.kernels.adaptive import every_kind, rehearse\n"
        "from modelfuse.kernels.jit.compile import compiling\n"
        "with compiling(False):\n"
        "    for work in every_kind(['linear']): rehearse(work)\n"
        "    from modelfuse.kernels.compiled import ordered_products\n"
        "    ordered_products._add._plain = None\n"
        "    ordered_products.add_product(*ordered_products.np.ones((3, 1, 1)))\n"
        "import sys; assert 'numba' not in sys.modules\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_method_that_does_not_exist() -> None:
    said = call("warm", "tie")
    assert said.status == 2
    assert "There is no method 'tie'" in said.err
    assert "Did you mean 'ties'?" in said.err


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_without_a_compiler(quiet: list[str], tmp_path: Path) -> None:
    done = warm(*quiet, folder=tmp_path, more={"NUMBA_DISABLE_JIT": "1"})
    assert done.returncode == 2
    assert "NUMBA_DISABLE_JIT is set" in done.stderr

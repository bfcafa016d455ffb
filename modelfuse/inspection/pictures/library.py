"""Vega-Lite as a script: put together once, and kept for this user alone."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from importlib.util import find_spec

from modelfuse.errors import MissingExtraError
from modelfuse.kernels.jit.code_cache import folders
from modelfuse.kernels.jit.private_files import private_folder, read_private, write_private

MISSING = ("Pages and pictures need Vega-Lite, which is not installed", "pip install 'modelfuse[report]'")


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script that nothing of HTML ends.

    Raises:
        MissingExtraError: If the extra is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError(*MISSING) from error
    name = f"vega-{version('vl-convert-python')}.js"
    for folder in folders():
        with contextlib.suppress(OSError), private_folder(folder) as descriptor:
            return read_private(descriptor, name).decode()
    script: str = vl_convert.javascript_bundle().replace("</script", "<\\/script").replace("<!--", "<\\!--")
    for folder in folders():
        with contextlib.suppress(OSError), private_folder(folder, make=True) as descriptor:
            write_private(descriptor, name, script.encode())
            break
    return script


def check_installed() -> None:
    """Refuse, before any work, what needs the extra.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if find_spec("vl_convert") is None:
        raise MissingExtraError(*MISSING)

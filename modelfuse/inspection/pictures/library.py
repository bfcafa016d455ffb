"""The Vega-Lite script, bundled once and cached for this user."""

from __future__ import annotations

import contextlib
import os
import zlib
from importlib.util import find_spec

from modelfuse.errors import MissingExtraError
from modelfuse.kernels.jit.code_cache import folders
from modelfuse.kernels.jit.private_files import private_folder, read_private, write_private

MISSING = ("Pages and pictures need Vega-Lite, which is not installed", "pip install 'modelfuse[report]'")


def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, without text that would end an HTML script element.

    Raises:
        MissingExtraError: If the extra is not installed.
    """
    name = f"vega-{_installed()}.js"
    for folder in folders():
        with contextlib.suppress(OSError), private_folder(folder) as descriptor:
            return read_private(descriptor, name).decode()
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError(*MISSING) from error
    script: str = vl_convert.javascript_bundle().replace("</script", "<\\/script").replace("<!--", "<\\!--")
    for folder in folders():
        with contextlib.suppress(OSError), private_folder(folder, make=True) as descriptor:
            write_private(descriptor, name, script.encode())
            break
    return script


def check_installed() -> None:
    """Check that the extra is installed, before any work is done.

    Raises:
        MissingExtraError: If it is not.
    """
    _installed()


def _installed() -> str:
    """A digest of the installed files' sizes and times; reading the version of the package takes longer."""
    try:
        found = find_spec("vl_convert")
    except ValueError:  # The module was replaced by None.
        found = None
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(*MISSING)
    with os.scandir(found.submodule_search_locations[0]) as entries:
        files = sorted((each.name, each.stat()) for each in entries if each.is_file())
    told = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in files]
    return f"{zlib.crc32(' '.join(told).encode()):08x}"

"""No file says whom this machine connects to: a token may go along, and a cluster is trusted with everything.

Recipes, merge_config.json among them, may come from anybody. The hub and the cluster are named on the command line, by
the environment, or by a program that calls this package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from modelfuse.errors import RecipeError

#: Where huggingface_hub looks names up if nothing else is said.
USUAL_ENDPOINT = "https://huggingface.co"


def is_usual(endpoint: object) -> bool:
    """Whether hub names would be looked up there without a word from any file."""
    usual = os.environ.get("HF_ENDPOINT") or USUAL_ENDPOINT
    return str(endpoint).rstrip("/") == usual.rstrip("/")


def without_hosts(what: str, settings: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The settings of a file, without an endpoint of the hub where the user names one.

    Args:
        what: The file, for errors.
        settings: What it says.
        own: What the user says; with ``hub_anonymous``, the file's endpoint is asked without a token.

    Raises:
        RecipeError: If the file names another host than the user does.
    """
    endpoint, address = settings.get("hub_endpoint"), settings.get("ray_address")
    kept = {name: value for name, value in settings.items() if name != "hub_endpoint"}
    if endpoint is not None and own.get("hub_endpoint") is None:
        if not is_usual(endpoint) and not own.get("hub_anonymous"):
            raise RecipeError(*refusal(what, endpoint))
        kept["hub_endpoint"] = endpoint
    named = own.get("ray_address") or os.environ.get("RAY_ADDRESS")
    if address not in (None, "local") and named is None:
        raise RecipeError(
            f"{what} names the Ray cluster at {address}, but a file is not to say whom to trust with a merge",
            f"If it is yours: --ray_address {address}.",
        )
    return kept


def refusal(what: str, endpoint: object) -> tuple[str, str]:
    """What is wrong with a file that names a hub, and what to do."""
    parts = urlsplit(str(endpoint))
    host = parts.hostname or str(endpoint)
    return (
        f"{what} has hub names looked up at {host}, but a file is not to say where your token is sent",
        f"If you trust {host}: --hub_endpoint {endpoint}. To ask it without any credentials: --hub_anonymous.",
    )

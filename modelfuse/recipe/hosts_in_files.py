"""Files may not choose the hosts to connect to: a token may be sent there, and a cluster is fully trusted.

Recipes, including merge_config.json, may come from anybody. The hub and the cluster are set on the command line, in the
environment, or by a calling program.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from modelfuse.errors import RecipeError

#: huggingface_hub's default endpoint.
USUAL_ENDPOINT = "https://huggingface.co"


def is_usual(endpoint: object) -> bool:
    """Whether this is the endpoint that is used without any file."""
    usual = os.environ.get("HF_ENDPOINT") or USUAL_ENDPOINT
    return str(endpoint).rstrip("/") == usual.rstrip("/")


def without_hosts(what: str, settings: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """The settings of a file, without its hub endpoint if the user gives one.

    Args:
        what: The file, for errors.
        settings: The file's settings.
        own: The user's settings; with ``hub_anonymous``, the file's endpoint is used without a token.

    Raises:
        RecipeError: If the file names another host than the user.
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
    """The message and the hint for a file that names a hub."""
    parts = urlsplit(str(endpoint))
    host = parts.hostname or str(endpoint)
    return (
        f"{what} has hub names looked up at {host}, but a file is not to say where your token is sent",
        f"If you trust {host}: --hub_endpoint {endpoint}. To ask it without any credentials: --hub_anonymous.",
    )

"""The user's configuration of stores: fsspec's settings in files and the environment, and AWS profiles.

obstore reads AWS_*, GOOGLE_* and AZURE_* variables itself; this module reads what it does not.
"""

from __future__ import annotations

import configparser
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelfuse.errors import CheckpointError, MissingExtraError

#: fsspec's folder of configuration files.
FOLDER = "~/.config/fsspec"
#: Settings of an AWS profile that boto3 exchanges for keys.
WAYS = ("role_arn", "sso_session", "sso_start_url", "sso_account_id", "credential_process", "web_identity_token_file",
        "login_session")  # fmt: skip


def fsspec_settings(*schemes: str) -> dict[str, Any]:
    """fsspec's configuration: files, then ``FSSPEC_S3`` (JSON), then ``FSSPEC_S3_KEY`` and the like.

    Raises:
        CheckpointError: If it cannot be parsed.
    """
    found: dict[str, Any] = {}
    for path in sorted(Path(os.environ.get("FSSPEC_CONFIG_DIR", FOLDER)).expanduser().glob("*")):
        for scheme in schemes:
            found |= _of_file(path).get(scheme, {})
    for scheme in schemes:
        name = f"FSSPEC_{scheme.upper()}"
        if name in os.environ:
            found |= _map(os.environ[name], name)
        prefix = f"{name}_"
        found |= {key[len(prefix) :].lower(): value for key, value in os.environ.items() if key.startswith(prefix)}
    return found


def _of_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        return _map(path.read_text(), str(path))
    return _sections(path) if path.suffix == ".ini" else {}


def _map(text: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):  # Not shown, as it may contain secrets.
        raise CheckpointError(f"{name} is not a JSON object", 'Write it as {"key": "value"}.')
    return found


def _sections(path: Path) -> dict[str, dict[str, str]]:
    """Parse an INI file; empty if it does not exist."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a valid configuration file: {type(error).__name__}") from error
    return {name: dict(parser[name]) for name in parser.sections()}


class Profile:
    """An AWS profile.

    Args:
        name: Its name; None: the one that AWS_PROFILE names, else the default one.
    """

    def __init__(self, name: str | None) -> None:
        named = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        self.name = named or "default"
        config = _sections(_path("AWS_CONFIG_FILE", "~/.aws/config"))
        secrets = _sections(_path("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
        section = config.get(f"profile {self.name}", config.get(self.name, {}))
        if named and self.name not in secrets and not section:
            raise CheckpointError(f"There is no AWS profile {self.name}", "Name one of ~/.aws/config with AWS_PROFILE.")
        self._settings = {**section, **secrets.get(self.name, {})}
        service = config.get(f"services {self._settings.get('services')}", {}).get("s3", "")
        self._service = dict(line.partition("=")[::2] for line in service.replace(" ", "").splitlines() if "=" in line)

    def get(self, key: str) -> str | None:
        """A setting of the profile, if it has one."""
        return self._service.get(key) or self._settings.get(key)

    def credentials(self) -> Any:
        """The credential provider for a role or a login; None if the profile has none.

        Raises:
            MissingExtraError: If it needs a package that is not installed.
        """
        if not any(self.get(way) for way in WAYS):
            return None
        try:
            from obstore.auth import boto3
        except ImportError as error:
            raise MissingExtraError(
                f"The AWS profile {self.name} needs boto3, which is not installed", "pip install boto3"
            ) from error
        return boto3.Boto3CredentialProvider(boto3.boto3.Session(profile_name=self.name))


def _path(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, default)).expanduser()

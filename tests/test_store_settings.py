"""How stores are found and who asks them: URLs, the environment, fsspec's settings, profiles; and what is refused."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from azure_blobs import Azure
from conftest import Said, make_model
from stores import ENVIRONMENT, S3
from test_storage import large, same_but_for_names

import modelfuse as package
from modelfuse.errors import CheckpointError, MissingExtraError, RecipeError
from modelfuse.storage import Url, path_or_url
from modelfuse.storage.remote import open_store, settings, uploads
from modelfuse.storage.remote.object_stores import S3Bucket

Run = Callable[..., Said]


def s3_of(monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    url = path_or_url("s3://bucket/A")
    assert isinstance(url, Url)
    open_store.forget(connections=True)
    store = open_store.store_of(url)
    assert isinstance(store, S3Bucket)
    return store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any settings, and an environment without any of AWS."""
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return home


# --- S3 ------------------------------------------------------------------------------------------------------------


def test_a_profile(s3: S3, home: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [s3.put(path, path.name) for path in pair]
    (home / ".aws" / "config").write_text(
        "[profile work]\nregion = eu-north-1\nservices = local\n"
        f"[services local]\ns3 =\n  endpoint_url = {s3.endpoint}\n"
    )
    (home / ".aws" / "credentials").write_text("[work]\naws_access_key_id = one\naws_secret_access_key = two\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    config = s3_of(monkeypatch)._options["config"]
    assert (config["region"], config["access_key_id"], config["aws_endpoint_url_s3"]) == (
        "eu-north-1", "one", s3.endpoint,
    )  # fmt: skip
    assert package.check(model_path_list=urls).tensors
    # What the environment says is preferred, as everywhere.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "access_key_id" not in s3_of(monkeypatch)._options["config"]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CheckpointError, match="There is no AWS profile nobody"):
        s3_of(monkeypatch)
    monkeypatch.delenv("AWS_PROFILE")


def test_a_profile_with_a_role_needs_another_package(s3: S3, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".aws" / "config").write_text("[default]\nrole_arn = arn\nsource_profile = work\n")
    with monkeypatch.context() as modules:
        modules.setitem(sys.modules, "boto3", None)
        modules.delitem(sys.modules, "obstore.auth.boto3", raising=False)
        with pytest.raises(MissingExtraError, match="The AWS profile default needs boto3"):
            s3_of(monkeypatch)


def test_a_profile_whose_program_tells_the_keys(s3: S3, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    keys = json.dumps({"Version": 1, "AccessKeyId": "one", "SecretAccessKey": "two"})
    (home / "keys").write_text(f"#!/bin/sh\necho '{keys}'\n")
    (home / "keys").chmod(0o755)
    (home / ".aws" / "config").write_text(f"[default]\ncredential_process = {home}/keys\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    assert s3_of(monkeypatch).list_now(Url("s3", "bucket", "")) == {}


def test_settings_of_fsspec(s3: S3, home: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [s3.put(path, path.name) for path in pair]
    with s3.speaking() as client:
        for name in s3.objects():
            client.put_object_acl(Bucket="bucket", Key=name, ACL="public-read")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("FSSPEC_S3", '{"anon": true}')
    assert s3_of(monkeypatch)._options["config"]["skip_signature"]
    assert package.check(model_path_list=urls).tensors
    folder = home / ".config" / "fsspec"
    folder.mkdir(parents=True)
    (folder / "conf.json").write_text('{"s3": {"key": "one", "secret": "two", "anon": false, "requester_pays": true}}')
    (folder / "more.ini").write_text("[s3]\ntoken = three\n")
    monkeypatch.delenv("FSSPEC_S3")
    config = s3_of(monkeypatch)._options["config"]
    assert [config.get(key) for key in ("access_key_id", "secret_access_key", "session_token", "skip_signature")] == [
        "one", "two", "three", None,
    ]  # fmt: skip
    assert config["request_payer"]
    monkeypatch.setenv("FSSPEC_S3", '{"client_kwargs": {"region_name": "north"}, "config_kwargs": '
                       '{"s3": {"addressing_style": "virtual"}}, "endpoint_url": "https://host:1"}')  # fmt: skip
    monkeypatch.delenv("FSSPEC_S3_ENDPOINT_URL")
    config = s3_of(monkeypatch)._options["config"]
    assert (config["aws_endpoint_url_s3"], config["region"]) == ("https://bucket.host:1", "north")
    monkeypatch.setenv("FSSPEC_S3", "{'anon': 5ecret}")
    with pytest.raises(CheckpointError, match="FSSPEC_S3 is not a JSON object") as raised:
        s3_of(monkeypatch)
    assert "5ecret" not in str(raised.value)


def test_a_folder_that_is_an_object_too(s3: S3, pair: tuple[Path, Path]) -> None:
    urls = [s3.put(path, path.name) for path in pair]
    with s3.speaking() as client:
        client.put_object(Bucket="bucket", Key="A/", Body=b"")
        client.put_object(Bucket="bucket", Key="A", Body=b"")
    assert package.check(model_path_list=urls).tensors


def test_a_name_that_is_no_path(refuse: Callable[..., str], s3: S3, pair: tuple[Path, Path], tmp_path: Path) -> None:
    urls = [s3.put(path, path.name) for path in pair]
    with s3.speaking() as client:
        client.put_object(Bucket="bucket", Key="A//x/b", Body=b"")
    says = [urls[0], "name is not a valid path"]
    refuse("merge", "--model_path_list", *urls, "--output_path", tmp_path / "out", says=says)


def test_signed_questions_are_signed_as_the_own_library_of_s3_would(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    store = s3_of(monkeypatch)
    query = "uploads=&delimiter=%2F&prefix=a%20b%2F%2B"
    address = store._signed("GET", "/some%20key", query)
    parts = parse_qs(urlsplit(address).query)
    moment = datetime.strptime(parts["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment

        @classmethod
        def utcnow(cls) -> Any:
            return moment.replace(tzinfo=None)

    for name in ("botocore.auth.datetime.datetime", "botocore.compat.datetime.datetime"):
        monkeypatch.setattr(name, Clock, raising=False)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_: moment.replace(tzinfo=None), raising=False)
    request = AWSRequest("GET", f"{s3.endpoint}/bucket/some%20key?{query}&x-id=%2Fmodelfuse")
    S3SigV4QueryAuth(Credentials("key", "secret"), "s3", "us-east-1", 300).add_auth(request)
    assert parse_qs(urlsplit(request.url).query)["X-Amz-Signature"] == parts["X-Amz-Signature"]


# --- other stores --------------------------------------------------------------------------------------------------


def test_google_cloud(
    merge: Run, refuse: Callable[..., str], s3: S3, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It speaks as S3 does, but for who asks."""
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    s3.trusts = True
    monkeypatch.setenv("GOOGLE_BASE_URL", s3.endpoint)
    account = {"gcs_base_url": s3.endpoint, "disable_oauth": True, "client_email": "", "private_key": "",
               "private_key_id": ""}  # fmt: skip
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    paths = [make_model(tmp_path / name, large(seed, 11)) for seed, name in enumerate("AB")]
    urls = [s3.put(path, path.name).replace("s3://", "gs://") for path in paths]
    merge("--model_path_list", *paths, "--output_path", tmp_path / "local")
    merge("--model_path_list", *urls, "--output_path", "gs://bucket/out")
    assert s3.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert any(each.condition for each in s3.asked)
    with monkeypatch.context() as nobody:
        nobody.delenv("GOOGLE_SERVICE_ACCOUNT")
        nobody.setenv("FSSPEC_GCS_TOKEN", "anon")
        open_store.forget(connections=True)
        assert package.check(model_path_list=urls).tensors
    open_store.forget(connections=True)
    s3.fault = lambda asked: 403 if "partNumber=2" in asked.query else None
    refuse("merge", "--model_path_list", *urls, "--output_path", "gs://bucket/other", says=["access is denied"])
    assert not s3.objects("other")
    refuse(
        "merge", "--model_path_list", "gs://nobody/A", *urls, "--output_path", tmp_path / "o", says=["gs://nobody/A"]
    )


def test_azure(merge: Run, refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PART", 5 << 20)
    paths = [make_model(tmp_path / name, large(seed, 11)) for seed, name in enumerate("AB")]
    merge("--model_path_list", *paths, "--output_path", tmp_path / "local")
    azure = Azure()
    try:
        for name, value in azure.environment.items():
            monkeypatch.setenv(name, value)
        open_store.forget(connections=True)
        urls = [azure.put(path, path.name) for path in paths]
        merge("--model_path_list", *urls, "--output_path", tmp_path / "remote")
        same_but_for_names(tmp_path / "local", tmp_path / "remote")
        merge("--model_path_list", *urls, "--output_path", "az://box/out")
        assert azure.blobs["out/model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
        assert azure.conditions
        azure.fails = lambda path, query: "comp=block&" in f"{query}&"
        refuse("merge", "--model_path_list", *urls, "--output_path", "az://box/other", says=["az://box/other"])
        assert [name for name in azure.blobs if name.startswith("other/")] == []
    finally:
        azure.stop()
        open_store.forget(connections=True)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("reference://b/A", "reference is not a known kind of store"),
        ("dir://b/A", "dir is not a known kind of store"),
        ("zip://A", "zip is not a known kind of store"),
        ("simplecache::s3://b/A", "a chained URL"),
        ("filecache::zip://a.zip::https://b/A", "a chained URL"),
        ("abfss://box@evil.example.org/A", "not an account of Azure"),
    ],
)
def test_places_that_are_no_stores(refuse: Callable[..., str], tmp_path: Path, place: str, says: str) -> None:
    refuse("merge", "--model_path_list", place, place, "--output_path", tmp_path / "out", says=[says])
    if "evil" not in place:
        refuse("verify", place, says=[says])
        with pytest.raises(RecipeError, match=r"store|chain"):
            package.check(model_path_list=[place, place])


def test_urls_of_azure() -> None:
    url = path_or_url("abfss://box@account.dfs.core.windows.net/a/b")
    assert isinstance(url, Url)
    assert (str(url), url.user) == ("abfss://box@account.dfs.core.windows.net/a/b", "")


def test_no_time_is_lost_where_no_machine_knows_who_asks(
    refuse: Callable[..., str], s3: S3, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    begun = time.monotonic()
    words = ("merge", "--model_path_list", "s3://bucket/A", "s3://bucket/B", "--output_path", tmp_path / "out")
    refuse(*words, says=["s3://bucket/A", "without credentials"], hint="AWS_ACCESS_KEY_ID")
    assert time.monotonic() - begun < 10


def test_files_of_settings_that_cannot_be_read(home: Path, tmp_path: Path) -> None:
    (home / ".aws" / "config").write_text("no section\n")
    with pytest.raises(CheckpointError, match="is not a valid configuration file"):
        settings.Profile(None)
    (home / ".aws" / "config").unlink()
    assert settings.Profile(None).get("region") is None

"""What S3's client library would send, without sending it."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import io
import ssl
import time
from collections.abc import Mapping
from typing import Any, cast

from modelfuse.storage.remote.connections import Body, Odd, Request, is_proxied
from modelfuse.storage.url import Entry

#: Seconds that a signature is used for. Stores take it for some minutes.
SECONDS = 60.0
#: The library's events before a request leaves, and the name that our part in them goes by.
EVENT, OPERATIONS, OURS = "before-send.s3", ("GetObject", "UploadPart"), "modelfuse"
#: Asks whether to send a body at all, which saves nothing here.
LEFT_OUT = ("expect",)
_IS_ASKING = contextvars.ContextVar("_IS_ASKING", default=False)


class _Prepared(Exception):
    """Raised in the library when a request is ready, to have it."""

    def __init__(self, request: Any) -> None:
        super().__init__("the request is ready")
        self.request = request


def _hand_over(request: Any, **_: object) -> None:
    if _IS_ASKING.get():
        raise _Prepared(request)


class Signer:
    """Has requests made and signed by s3fs as it is configured: endpoint, region, style of addresses, credentials.

    Args:
        fs: s3fs's file system.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._lock = asyncio.Lock()
        self._reading: dict[tuple[str, str, Entry], tuple[float, Request]] = {}
        self._context: ssl.SSLContext | None = None

    async def reading(self, bucket: str, key: str, entry: Entry) -> Request:
        """How to ask for a version of an object. Ranges are no part of what is signed: it serves for all of them.

        Raises:
            Odd: If the library is set up to ask in a way that is not known here.
        """
        async with self._lock:
            moment, request = self._reading.get((bucket, key, entry), (0.0, None))
            if request is None or time.monotonic() > moment + SECONDS:
                request = await self.prepared("get_object", Bucket=bucket, Key=key, IfMatch=entry.version)
                self._reading[bucket, key, entry] = time.monotonic(), request
            return request

    def forget(self) -> None:
        """Sign anew."""
        self._reading.clear()

    async def prepared(self, method: str, **options: Any) -> Request:
        """What one of the client's methods would send.

        Raises:
            Odd: If it would send it in a way that is not known here.
        """
        await self._fs.set_session()
        client = await self._fs.get_s3(options["Bucket"])
        config = client.meta.config
        if config.proxies or config.client_cert:
            raise Odd("a proxy, or a certificate of our own")
        for operation in OPERATIONS:
            client.meta.events.register(f"{EVENT}.{operation}", _hand_over, unique_id=f"{OURS}-{operation}")
        asking = _IS_ASKING.set(True)
        try:
            await self._fs._call_s3(method, **options)
        except _Prepared as prepared:
            request = prepared.request
        else:
            raise Odd("the request was sent")
        finally:
            _IS_ASKING.reset(asking)
        url = str(request.url)
        if is_proxied(url):
            raise Odd("a proxy")
        context = self._proof() if url.startswith("https:") else None
        return Request(
            request.method, url, _text(request.headers), context, config.connect_timeout, config.read_timeout,
            _body(request.body),
        )  # fmt: skip

    def _proof(self) -> ssl.SSLContext:
        """Trusts whom the library trusts."""
        if self._context is None:
            from botocore.httpsession import get_cert_path

            trusted = self._fs.client_kwargs.get("verify", self._fs.session.get_config_variable("ca_bundle"))
            if trusted is False:
                raise Odd("servers need not prove who they are")
            self._context = ssl.create_default_context(cafile=get_cert_path(True if trusted is None else trusted))
        return self._context


def _text(headers: Mapping[str, str | bytes]) -> dict[str, str]:
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in headers.items()
        if name.lower() not in LEFT_OUT
    }


def _body(body: Any) -> bytes | bytearray | Body | None:
    if body is None or isinstance(body, bytes | bytearray):
        return body or None
    if isinstance(body, io.BytesIO):
        return body.getvalue()
    if inspect.iscoroutinefunction(body.read):  # Followed by a checksum, which is computed meanwhile.
        return cast(Body, body)
    raise Odd(f"a body that is a {type(body).__name__}")

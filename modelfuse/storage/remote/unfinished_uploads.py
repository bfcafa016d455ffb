"""Abort unfinished uploads to S3 that a killed merge has left; the next merge does it.

obstore aborts its own failed uploads, but can neither list uploads nor abort those of another process.
"""

from __future__ import annotations

import html
import re
import ssl
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

#: Signs a request, given the method, the object's path (with a leading slash, without the bucket) and the query.
Sign = Callable[[str, str, str], str]
#: Time limit of a request in seconds; the most bytes of a listing (of a thousand uploads); and the most listings.
SECONDS, MOST_BYTES, MOST_PAGES = 30.0, 4 << 20, 100


def abort_all(sign: Sign, client: Mapping[str, Any], folder: str) -> None:
    """Abort the uploads of files in a folder."""
    prefix = quote(f"{folder}/" if folder else "", safe="")
    for _ in range(MOST_PAGES):
        page = _ask(client, "GET", sign("GET", "", f"uploads=&delimiter=%2F&prefix={prefix}"))
        for upload in re.findall(r"<Upload>(.*?)</Upload>", page, re.DOTALL):
            key, number = (html.unescape(_text(upload, name)) for name in ("Key", "UploadId"))
            query = f"uploadId={quote(number, safe='')}"
            _ask(client, "DELETE", sign("DELETE", f"/{quote(key)}", query))
        if _text(page, "IsTruncated") != "true":
            return


def _text(xml: str, name: str) -> str:
    found = re.search(f"<{name}>(.*?)</{name}>", xml, re.DOTALL)
    return found[1] if found else ""


def _ask(client: Mapping[str, Any], method: str, address: str) -> str:
    """Make a request to a signed URL."""
    request = urllib.request.Request(address, method=method)
    with urllib.request.urlopen(request, timeout=SECONDS, context=_trust(client, address)) as response:
        return str(response.read(MOST_BYTES).decode())


def _trust(client: Mapping[str, Any], address: str) -> ssl.SSLContext | None:
    """The certificates that obstore trusts for this store."""
    if not address.startswith("https:"):
        return None
    context = ssl.create_default_context()
    if (certificate := client.get("root_certificate")) is not None:
        context.load_verify_locations(cadata=certificate.decode())
    if client.get("allow_invalid_certificates"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context

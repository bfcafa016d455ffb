"""Web servers. They have no listings, so files are looked up under their possible names."""

from __future__ import annotations

import base64
import functools
import ssl
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

import obstore
from obstore.store import HTTPStore

from modelfuse.errors import CheckpointError, ModelfuseError
from modelfuse.storage.remote.errors import RangesUnsupported, RedirectsAway, answer, is_unranged
from modelfuse.storage.remote.object_stores import ObjectStore, attempts, connecting
from modelfuse.storage.remote.stores import Part
from modelfuse.storage.url import Entry, Url

#: File names that are looked up: weights, and files beside them.
KNOWN = (
    *(f"{stem}{suffix}{index}"
      for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"), ("model_state", ".pdparams"),
                           ("master_weights", ".safetensors"), ("master_weights", ".bin"),
                           ("master_weights", ".pdparams"), ("adapter_model", ".safetensors"),
                           ("adapter_model", ".bin"), ("peft_model", ".safetensors"),
                           ("lora_model_state", ".pdparams"), ("diffusion_pytorch_model", ".safetensors"),
                           ("diffusion_pytorch_model", ".bin"))
      for index in ("", ".index.json")),
    "adapter_config.json", "lora_config.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "spiece.model", "sentencepiece.bpe.model",
    "merge_config.json", "merge_report.json",
)  # fmt: skip
#: Suffixes of files; other names are folders.
FILES = (".safetensors", ".bin", ".pdparams", ".json")
#: Status codes of HEAD requests after which a range is requested instead: signed URLs allow only one method.
ANOTHER_WAY = (403, 405, 501)
#: Status codes of redirects, and the most redirects in a row.
LEADS, MOST_LEADS = (301, 302, 303, 307, 308), 10
#: Time limit in seconds to resolve a redirect.
LOOK_SECONDS = 30.0


class WebStore(ObjectStore):
    """A web server.

    Args:
        url: A URL on the server, whose user and query are used for all requests.
        headers: Additional headers of all requests.
        client: Options of the HTTP client.
    """

    lists = writes = False

    def __init__(self, url: Url, headers: Mapping[str, str], client: Mapping[str, Any]) -> None:
        self._headers = {"Accept-Encoding": "identity", **headers}
        if url.user:  # As a header: in the URL, it would appear in the library's errors and in redirects.
            user = unquote(url.user.removesuffix("@"))
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        base = replace(url, path="", user="")
        options = connecting(allow_http=url.scheme == "http", default_headers=self._headers, **client)
        super().__init__(HTTPStore(base.address, client_options=options, retry_config=attempts(1)))
        self._others: dict[str, set[str]] = {}
        self._stays: set[Url] = set()

    def forget(self) -> None:
        super().forget()
        self._others.clear()
        self._stays.clear()

    def key(self, url: Url) -> str:
        return unquote(url.path)

    def _condition(self, entry: Entry) -> str | None:
        return None  # Few web servers support conditions; the entity tag of each answer is compared instead.

    def list_now(self, folder: Url, kind: type[ModelfuseError] = CheckpointError) -> dict[str, Entry | None]:
        return {} if folder.path.endswith(FILES) else self._all(folder, KNOWN, kind)

    def entry(self, url: Url) -> Entry | None:
        if url.name not in KNOWN:
            self.look_up(url.parent, [url.name])
        return super().entry(url)

    def look_up(self, folder: Url, names: Iterable[str]) -> None:
        with self._lock:
            listing, asked = self._listings.get(str(folder)), self._asked(folder)
            wanted = [name for name in names if name not in asked]
        if listing is None or not wanted:
            return
        found = self._all(folder, wanted)
        with self._lock:
            listing.update(found)
            asked.update(wanted)

    def _asked(self, folder: Url) -> set[str]:
        return self._others.setdefault(str(folder), set(KNOWN))

    def _all(
        self, folder: Url, names: Iterable[str], kind: type[ModelfuseError] = CheckpointError
    ) -> dict[str, Entry | None]:
        names = list(names)
        requests = [functools.partial(self._ask, folder / name) for name in names]
        # One request goes first, so that a server that does not answer is asked only once.
        found = [*self.together(folder, requests[:1], kind), *self.together(folder, requests[1:], kind)]
        return {name: entry for name, entry in zip(names, found, strict=True) if entry is not None}

    def _ask(self, url: Url) -> Entry | None:
        if url.query and url not in self._stays:
            self._look_where_it_leads(url)
            self._stays.add(url)
        try:
            return super()._ask(url)
        except Exception as error:
            if answer(error)[0] not in ANOTHER_WAY and "MissingContentLength" not in str(error):
                raise
        try:  # The answer for one byte has the size, too.
            result = obstore.get(self._reader, self.key(url), options={"range": (0, 1)})
        except Exception as error:
            if is_unranged(error):
                raise RangesUnsupported from error
            if answer(error)[0] in (404, 410):
                return None
            raise
        return self.entry_of(result.meta)

    def _look_where_it_leads(self, url: Url) -> None:
        """Check that a URL does not redirect to another server.

        The library would follow, and send the whole URL with its signature as the referrer.
        """
        address = replace(url, user="", path=quote(self.key(url))).address
        for _ in range(MOST_LEADS):
            request = urllib.request.Request(address, headers={**self._headers, "Range": "bytes=0-0"})
            try:
                _opener().open(request, timeout=LOOK_SECONDS).close()
                return
            except HTTPError as error:
                error.close()
                if error.code not in LEADS or "Location" not in error.headers:
                    return
                target = urljoin(address, error.headers["Location"])
            except URLError as error:
                raise ConnectionError(str(error.reason)) from error
            if urlsplit(target).netloc != urlsplit(address).netloc:
                raise RedirectsAway(urlsplit(target).netloc.rpartition("@")[2])
            address = target

    def _list(self, folder: Url) -> dict[str, Entry | None]:
        raise NotImplementedError

    def put(self, url: Url, content: bytes) -> None:
        raise NotImplementedError

    def put_parts(self, url: Url, parts: Iterator[Part], size: int) -> None:
        raise NotImplementedError

    def _remove(self, url: Url) -> None:
        raise NotImplementedError


class _Staying(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects: they raise an HTTPError."""

    def redirect_request(self, *_: Any) -> None:
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Staying, urllib.request.HTTPSHandler(context=ssl.create_default_context()))

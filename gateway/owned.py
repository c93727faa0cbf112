"""The files and batches of many accounts in the operator's one account at a provider: each sees its own alone.

Whoever brings a credential of theirs is in an account of theirs, and an admin sees everything; of neither is anything
asked here. For all others an object that is not theirs does not exist, in the provider's own words.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from aiohttp import hdrs, web

from gateway.appkeys import BELONGINGS, EXCHANGE, SETTINGS
from gateway.identity import tenant
from gateway.passthrough import Passage
from gateway.protocol.endpoints import Endpoint, Kind, is_id, not_found
from gateway.protocol.errors import AnswerTooLarge, InvalidRequest, Unavailable, UpstreamBadBody
from gateway.protocol.json_object import read_json
from gateway.protocol.refusals import refusal
from gateway.protocol.routing import Target
from gateway.upstream import Passed

log = logging.getLogger("gateway.owned")

PAGE_OF: Mapping[Kind, int] = {"file": 1000, "batch": 100}  # objects of one page: OpenAI gives 10,000 and 100 at most
_MOST = max(PAGE_OF.values())
MAX_LIST = 8 << 20  # bytes of a list that are gathered; 10,000 files with usual names are three million
_PLURAL: Mapping[Kind, str] = {"file": "files", "batch": "batches"}
# What a list has when nobody says: https://platform.openai.com/docs/api-reference/files/list
_USUAL: Mapping[Kind, int] = {"file": 10_000, "batch": 20}
_FILE_FIELDS = ("input_file_id", "output_file_id", "error_file_id")  # of a batch


class Owned:
    """What one caller may see at one target. Its methods raise Unavailable."""

    def __init__(self, request: web.Request, target: Target) -> None:
        principal = request[EXCHANGE].principal
        assert principal is not None
        self._belongings = request.app[BELONGINGS]
        self._account_id = principal.account_id
        self._seconds = request.app[SETTINGS].gateway_total_timeout
        self._target = target
        self._provider = target.provider.name
        self._most = _MOST  # objects of a page, as long as they fit
        self.shared = not target.own_credential  # the account is the operator's
        self.filtered = self.shared and tenant(principal) is not None

    async def ready(self) -> None:
        """What is about to be made can be made somebody's."""
        if self.shared:
            await self._belongings.check()

    async def check(self, kind: Kind, ids: Sequence[str]) -> None:
        """Raises UpstreamRejected, with a 404, for one that is not the caller's."""
        if not self.filtered or not ids:
            return
        owned = await self._belongings.owned(self._provider, kind, ids, self._account_id)
        for object_id in ids:
            if object_id not in owned:
                raise refusal(404, not_found(kind, object_id[:128]), self._target, of_model=False)

    async def note(self, endpoint: Endpoint, body: bytes) -> None:
        """What the provider says of an object of the caller's: it, and a batch's files, are the caller's, too."""
        if not self.shared or (endpoint.act != "create" and not self.filtered):
            return  # what an admin looks at does not become the admin's
        said = read_json(body)
        if not isinstance(said, dict) or not is_id(said.get("id")):
            raise UpstreamBadBody("the provider's answer has no id")
        if endpoint.act == "create":
            await self._take(endpoint.kind, said["id"])
        if endpoint.kind == "batch":
            files = [said[name] for name in _FILE_FIELDS if is_id(said.get(name))]
            await self._belongings.add(self._provider, "file", files, self._account_id)

    async def _take(self, kind: Kind, object_id: str) -> None:
        try:
            await self._belongings.add(self._provider, kind, [object_id], self._account_id)
        except Unavailable:
            log.warning("%s %s at %s is nobody's: Postgres went when it was made", kind, object_id, self._provider)
            raise

    async def forget(self, endpoint: Endpoint, object_id: str) -> None:
        """The provider has it no more. A row that stays does no harm."""
        if self.shared:
            with suppress(Unavailable):
                await self._belongings.forget(self._provider, endpoint.kind, object_id)

    # --- lists

    async def page(self, passage: Passage, endpoint: Endpoint, query: str) -> bytes:
        """A list of the caller's own, gathered from the provider's pages. Raises GatewayError.

        One that may not be whole says so, and has an object: the SDKs go on behind the last they got, and stop where
        there is none.
        """
        given = dict(parse_qsl(query, keep_blank_values=True))
        limit, after = _limit(given, endpoint.kind), given.get("after", "")
        if after:
            await self.check(endpoint.kind, [after])
        found, more = await self._gather(passage, endpoint, given, limit)
        ids = [item["id"] for item in found[:limit]]
        return orjson.dumps(
            {
                "object": "list",
                "data": found[:limit],
                "first_id": ids[0] if ids else None,
                "last_id": ids[-1] if ids else None,
                "has_more": more or len(found) > limit,
            }
        )

    async def _gather(
        self, passage: Passage, endpoint: Endpoint, given: Mapping[str, str], limit: int
    ) -> tuple[list[Any], bool]:
        """Those behind `after`, one more than `limit` if there are so many; whether there may be others."""
        found: list[Any] = []
        seen, size, after, until = 0, 0, given.get("after", ""), monotonic() + self._seconds
        while True:
            listed, more = await self._next(passage, endpoint, given, after)
            own = await self._own(endpoint.kind, listed)
            found += own
            seen += len(listed)
            size += len(orjson.dumps(own))
            if not more or (len(found) <= limit and await self._are_all(endpoint, found)):
                return found, False
            if len(found) > limit or size > MAX_LIST or (found and monotonic() > until):
                return found, True
            if monotonic() > until:
                words = f"none of yours is among the {seen} {_PLURAL[endpoint.kind]} that {self._provider} listed"
                raise Unavailable(f"{words} within {self._seconds:g} s, and there are more", code="list_incomplete")
            after = listed[-1]["id"]

    async def _are_all(self, endpoint: Endpoint, found: Sequence[Any]) -> bool:
        ids = [item["id"] for item in found]
        return not await self._belongings.has_others(self._provider, endpoint.kind, ids, self._account_id)

    async def _next(
        self, passage: Passage, endpoint: Endpoint, given: Mapping[str, str], after: str
    ) -> tuple[list[Any], bool]:
        said = read_json(await self._page(passage, endpoint, {**given, **({"after": after} if after else {})}))
        listed = said.get("data") if isinstance(said, dict) else None
        if not isinstance(listed, list) or not all(isinstance(item, dict) and is_id(item.get("id")) for item in listed):
            raise UpstreamBadBody("the provider's answer is no list of objects")
        if any(item["id"] == after for item in listed):  # it does not know `after`, and would never end
            raise UpstreamBadBody("the provider's list begins again")
        return listed, bool(listed) and said.get("has_more") is True

    async def _page(self, passage: Passage, endpoint: Endpoint, asked: Mapping[str, str]) -> bytes:
        """As many objects as fit in a document: whoever gave theirs long names does not hide the others'."""
        while True:
            size = min(self._most, PAGE_OF[endpoint.kind])
            try:
                query = urlencode({**asked, "limit": str(size)})
                return await passage.document(Passed(hdrs.METH_GET, endpoint.path, query=query))
            except AnswerTooLarge:
                if size == 1:
                    raise
                self._most = max(size // 10, 1)  # for the pages behind it, too

    async def _own(self, kind: Kind, listed: list[Any]) -> list[Any]:
        ids = [item["id"] for item in listed]
        owned = await self._belongings.owned(self._provider, kind, ids, self._account_id)
        own = [item for item in listed if item["id"] in owned]
        files = [item[name] for item in own for name in _FILE_FIELDS if kind == "batch" and is_id(item.get(name))]
        await self._belongings.add(self._provider, "file", files, self._account_id)
        return own


def _limit(given: Mapping[str, str], kind: Kind) -> int:
    text = given.get("limit", "")
    if not text:
        return _USUAL[kind]
    if not (text.isascii() and text.isdecimal() and len(text) < 6) or not 0 < int(text) <= 10_000:
        raise InvalidRequest("limit: an integer from 1 to 10000 is required", param="limit")
    return int(text)


_NESTED = (dict, list)


def named_files(value: Any) -> Iterator[str]:
    """Ids of files that a request's JSON refers to, wherever in it."""
    inside = [value]
    for one in inside:  # which grows meanwhile
        if isinstance(one, dict):
            yield from [text for name, text in one.items() if isinstance(text, str) and name.endswith("file_id")]
            one = one.values()
        elif not isinstance(one, list):
            continue
        inside += [inner for inner in one if isinstance(inner, _NESTED)]

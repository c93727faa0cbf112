"""Which models there are: the routes, and what the providers list, asked again in the background."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import orjson

from gateway.protocol.dialects import DIALECTS
from gateway.protocol.errors import GatewayError, PermissionDenied
from gateway.protocol.pricing import Price, PriceTable
from gateway.protocol.request import Listed
from gateway.protocol.routing import Provider, Route, Routes, Target, is_pattern
from gateway.upstream import Upstream

log = logging.getLogger("gateway.catalogue")

REFRESH = 60.0  # seconds between two looks at every provider's list
MAX_PATTERNS = 256  # different sets of allowed models whose list is remembered
MAX_ROUTES = 4096  # of different questions that are remembered; clients choose the names
PROBE_TIMEOUT = 3.0  # seconds for a provider to give its list; it is asked again at the next look


class Model(NamedTuple):
    id: str  # the name to ask for
    owned_by: str
    context_length: int | None = None  # tokens of prompt and answer; None: nobody says it
    price: Price | None = None

    def object(self) -> dict[str, Any]:
        """OpenAI's, and beside it what is known in the words of https://openrouter.ai/docs/overview/models."""
        said: dict[str, Any] = {"id": self.id, "object": "model", "created": 0, "owned_by": self.owned_by}
        if self.context_length is not None:
            said["context_length"] = self.context_length
        if self.price is not None:
            said["pricing"] = self.price.to_openrouter()
        return said


class Catalogue:
    """Routes and models of this process. It writes what it learns itself; `follow` is a reload's.

    `on_models` hears of the names that may become labels, `on_look` of each provider whether it gave its list. Opened
    and closed by app.py.
    """

    def __init__(
        self,
        routes: Routes,
        upstream: Upstream,
        prices: PriceTable,
        *,
        on_models: Callable[[set[str]], None],
        on_look: Callable[[str, bool], None] = lambda name, listed: None,
    ) -> None:
        self.routes = routes
        self._upstream = upstream
        self._prices = prices
        self._on_models = on_models
        self._on_look = on_look
        self._listed: dict[str, Sequence[Listed]] = {}  # by provider, what it said when it last answered
        self._answers_by_patterns: dict[tuple[str, ...], list[Model]] = {}  # to `models`, until the next look
        self._known: dict[tuple[str, tuple[str, ...]], Route] = {}  # by what `resolve` was asked, likewise
        self.reachable: dict[str, bool] = {}  # by provider, as of the last look
        self._publish()

    def follow(self, routes: Routes) -> None:
        """Other routes from now on. What was learned of a provider that stays where it is stays known."""
        before, self.routes = self.routes.providers, routes
        for name, provider in before.items():
            now = routes.providers.get(name)
            if now is None or now.base_url != provider.base_url:
                self._listed.pop(name, None)
                self.reachable.pop(name, None)
            elif now.probed and self.reachable.get(name):
                self.routes = self.routes.with_enabled(name, True)
        self._publish()

    def resolve(self, model: str, own_credential: str | None, allowed: tuple[str, ...]) -> Route:
        """Who may answer for a model name. Raises ModelNotFound, or PermissionDenied when the key may not use it."""
        if own_credential is not None:  # it is for this one request: nothing of it is remembered
            return self._resolve(model, own_credential, allowed)
        route = self._known.get(asked := (model, allowed))
        if route is None:
            route = self._resolve(model, None, allowed)
            if len(self._known) >= MAX_ROUTES:
                self._known.clear()
            self._known[asked] = route
        return route

    def _resolve(self, model: str, own_credential: str | None, allowed: Sequence[str]) -> Route:
        route = self.routes.resolve(model, own_credential)
        if allowed and not self._may(allowed, model, route[0][0]):
            raise PermissionDenied(f"this key may not use the model {model!r}", param="model", code="model_not_allowed")
        return route

    @staticmethod
    def _may(allowed: Sequence[str], model: str, target: Target) -> bool:
        names = (model, f"{target.provider.name}/{target.model}")
        return any(fnmatchcase(name, pattern) for pattern in allowed for name in names)

    def models(self, allowed: Sequence[str]) -> list[Model]:
        """Every model that a key with these patterns may ask for by name, aliases first."""
        known = self._answers_by_patterns.get(patterns := tuple(allowed))
        if known is None:
            if len(self._answers_by_patterns) >= MAX_PATTERNS:
                self._answers_by_patterns.clear()
            known = self._answers_by_patterns[patterns] = self._models(patterns)
        return known

    def _models(self, allowed: Sequence[str]) -> list[Model]:
        routes = self.routes
        found = dict.fromkeys(routes.aliases, "alias")
        found |= {name: self._owner(name) for name in routes.plans if not is_pattern(name)}
        for provider in routes.providers.values():
            if provider.enabled:
                for listed in self._models_of(provider):
                    found.setdefault(self._ask_for(provider, listed), provider.label)
        windows = {
            (provider, listed.name): listed.context_length
            for provider, rows in self._listed.items()
            for listed in rows
            if listed.context_length is not None
        }
        models = (self._model(name, label, allowed, windows) for name, label in found.items())
        return [model for model in models if model is not None]

    def _model(
        self, name: str, label: str, allowed: Sequence[str], windows: Mapping[tuple[str, str], int]
    ) -> Model | None:
        """As who answers first has it; None when nobody does."""
        try:
            target = self._resolve(name, None, allowed)[0][0]
        except GatewayError:
            return None
        asked = target.provider.name, target.model
        window = windows.get(asked) or self._prices.context_length(*asked)
        return Model(name, label, window, self._prices.price(*asked))

    def _owner(self, name: str) -> str:
        """Of a name with a plan: who answers first."""
        try:
            return self.routes.resolve(name)[0][0].provider.label
        except GatewayError:  # nobody at this time: `_answers` leaves it out
            return ""

    def _models_of(self, provider: Provider) -> Iterable[str]:
        return dict.fromkeys([*provider.models, *(listed.name for listed in self._listed.get(provider.name, ()))])

    def _ask_for(self, provider: Provider, model: str) -> str:
        """The plain name when it leads to this provider; else `provider/model`."""
        try:
            plain = self.routes.resolve(model)[0][0].provider.name == provider.name
        except GatewayError:
            plain = False
        return model if plain else f"{provider.name}/{model}"

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH)

    async def refresh(self) -> None:
        """Ask every provider that may answer for its models; one that fails keeps its last list."""
        await self.look_now(self.routes.answering())

    async def look_now(self, names: Collection[str]) -> None:
        """Ask these providers: the cheapest sign that one is there."""
        providers = [self.routes.providers[name] for name in names if name in self.routes.providers]
        await asyncio.gather(*(self._look_at(provider) for provider in providers))
        self._publish()

    async def _look_at(self, provider: Provider) -> None:
        dialect = DIALECTS[provider.dialect]
        try:
            body = await self._upstream.get(provider, dialect.models_path, PROBE_TIMEOUT)
            listed: Sequence[Listed] | None = dialect.models(orjson.loads(body))
        except (GatewayError, ValueError) as error:
            log.debug("models of %s: %s", provider.name, error)
            listed = None
        now = self.routes.providers.get(provider.name)
        if now is None or now.base_url != provider.base_url:
            return  # a reload moved it while it was asked
        self.reachable[provider.name] = listed is not None
        if now.probed and now.enabled != (listed is not None):
            self.routes = self.routes.with_enabled(provider.name, listed is not None)
            self._known.clear()
        if listed is not None:
            self._listed[provider.name] = listed
        self._on_look(provider.name, listed is not None)

    def _publish(self) -> None:
        """Names that may become metric labels, as they are asked for: the providers' and the operator's own alone."""
        self._answers_by_patterns.clear()
        self._known.clear()
        names = {*self.routes.aliases, *(name for name in self.routes.plans if not is_pattern(name))}
        for provider in self.routes.providers.values():
            for name in self._models_of(provider):
                plain = name.removesuffix(":latest")  # Ollama answers for both
                names |= {name, plain, f"{provider.name}/{name}", f"{provider.name}/{plain}"}
        self._on_models(names)

"""Which provider answers for a model name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from gateway.protocol.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class Provider:
    """Who answers, and in which dialect. What a vendor does differently is a field here, never a branch in code."""

    name: str
    dialect: str  # a name in DIALECTS: openai, anthropic, ollama
    base_url: str  # without a trailing slash; for OpenAI-shaped providers with its /v1
    api_key: str | None = field(default=None, repr=False)
    enabled: bool = True  # has what it needs: a key, or an address that answers
    auth: str = "bearer"  # how the credential travels: bearer, x-api-key, api-key
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with every request
    rules: Sequence[str] = ()  # model name patterns, `gpt-*`
    models: Sequence[str] = ()  # names known without asking
    asks_usage: bool = True  # takes stream_options.include_usage
    label: str = ""  # shown as `owned_by` in /v1/models


@dataclass(frozen=True, slots=True)
class Target:
    """One provider + model + credential."""

    provider: Provider
    model: str  # the provider's own name for it
    credential: str | None = field(default=None, repr=False)
    own_credential: bool = False  # the caller's own, not the operator's
    weight: int = 1  # its share among the targets of its group


# Who may answer: groups of targets, in the order in which they are asked; in a group weight and load choose.
Route = tuple[tuple[Target, ...], ...]


@dataclass(frozen=True, slots=True)
class Routes:
    providers: Mapping[str, Provider]
    aliases: Mapping[str, str] = field(default_factory=dict)  # alias -> `provider/model` or a model name
    default: str = "ollama"

    def resolve(self, model: str, own_credential: str | None = None) -> Route:
        """Who may answer for a model name: at least one target. Raises ModelNotFound when there is none.

        `provider/model` when it names a provider; else the longest matching rule; else the default provider. A provider
        without a credential of the operator's answers only for a caller who brings one.
        """
        name = self.aliases.get(model, model)
        provider, upstream_model = self._choose(name)
        if provider is None or not (provider.enabled or own_credential):
            raise ModelNotFound(self._explain(model, provider), param="model")
        target = Target(
            provider,
            upstream_model,
            credential=own_credential or provider.api_key,
            own_credential=own_credential is not None,
        )
        return ((target,),)

    def _choose(self, name: str) -> tuple[Provider | None, str]:
        prefix, slash, rest = name.partition("/")
        if slash and rest and prefix in self.providers:
            return self.providers[prefix], rest
        matches = [
            (len(rule), provider)
            for provider in self.providers.values()
            for rule in provider.rules
            if fnmatchcase(name, rule)
        ]
        if matches:
            return max(matches, key=lambda match: match[0])[1], name
        return self.providers.get(self.default), name

    def _explain(self, model: str, provider: Provider | None) -> str:
        answering = ", ".join(p.name for p in self.providers.values() if p.enabled) or "none"
        if provider is not None and provider.name != self.default:
            return f"the model {model!r} belongs to {provider.name}, which has no credential here"
        return f"the model {model!r} does not exist here; providers that answer: {answering}"

    def with_enabled(self, name: str, enabled: bool) -> "Routes":
        """The same routes with one provider switched on or off (a local server that came or went)."""
        provider = replace(self.providers[name], enabled=enabled)
        return replace(self, providers={**self.providers, name: provider})

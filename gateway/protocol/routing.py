"""Which providers answer for a model name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from gateway.protocol.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class Provider:
    """Who answers, and in which dialect. What a vendor does differently is a field here, never a branch in code."""

    name: str
    dialect: str  # a name in DIALECTS: openai, anthropic, ollama
    base_url: str  # without a trailing slash; for OpenAI-shaped providers with its /v1; "": nobody said where it is
    api_key: str | None = field(default=None, repr=False)
    enabled: bool = True  # has what it needs: a key, or an address that answers
    probed: bool = False  # on only while it answers: nobody said that it is there
    auth: str = "bearer"  # how the credential travels: bearer, x-api-key, api-key
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with every request
    query: str = ""  # of every address: `api-version=2024-10-21`
    rules: Sequence[str] = ()  # model name patterns, `gpt-*`
    models: Sequence[str] = ()  # names known without asking
    label: str = ""  # shown as `owned_by` in /v1/models
    # What the OpenAI dialect changes in a request (dialects/openai/request.py).
    asks_usage: bool = True  # takes stream_options.include_usage
    renames: Mapping[str, str] = field(default_factory=dict)  # parameters that it knows by another name
    drops: Sequence[str] = ()  # parameters that it refuses, and that an answer is as good without
    roles: Mapping[str, str] = field(default_factory=dict)  # roles of messages, likewise: developer -> system
    tool_id_length: int = 0  # letters and digits that a tool call's id has, exactly; 0: any id


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

SAME_NAME = "*"  # the model of a target of a pattern: the name that was asked for


@dataclass(frozen=True, slots=True)
class Share:
    """One of several targets of a model, as the operator wrote it."""

    provider: str
    model: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What the operator wants of a model name, or of all that a pattern fits."""

    shares: Sequence[Share] = ()  # none: whom the rules name
    fallbacks: Sequence[str] = ()  # names, each resolved without a plan's own fallbacks


def is_pattern(name: str) -> bool:
    """A plan's name that stands for many: `gpt-*`."""
    return "*" in name


@dataclass(frozen=True, slots=True)
class Routes:
    providers: Mapping[str, Provider]
    aliases: Mapping[str, str] = field(default_factory=dict)  # alias -> `provider/model` or a model name
    plans: Mapping[str, Plan] = field(default_factory=dict)  # by model name or pattern
    default: str = "ollama"

    def resolve(self, model: str, own_credential: str | None = None) -> Route:
        """Who may answer for a model name: at least one target. Raises ModelNotFound when there is none.

        The operator's plan for the name, else `provider/model` when it names a provider, else the longest matching
        rule, else the default provider. The caller's own credential goes to the provider that is named first, whose
        operator may have none, and to no other.
        """
        plan = self.plan_of(self._meant(model)) or Plan()
        names = [model, *plan.fallbacks]
        shares = [self._shares(self._meant(name)) for name in names]
        owner = shares[0][0].provider if own_credential and shares[0] else ""
        groups = [tuple(self._targets(group, owner, own_credential)) for group in shares]
        route = tuple(group for group in groups if group)
        if not route:
            raise ModelNotFound(self._explain(model, shares[0]), param="model")
        return route

    def choose(self, name: str) -> tuple[str, str]:
        """A provider's name and its model, by rules alone: `provider/model`, the longest rule, the default."""
        prefix, slash, rest = name.partition("/")
        if slash and rest and prefix in self.providers:
            return prefix, rest
        matches = [
            (len(rule), provider.name)
            for provider in self.providers.values()
            for rule in provider.rules
            if fnmatchcase(name, rule)
        ]
        if matches:
            return max(matches, key=lambda match: match[0])[1], name
        return self.default, name

    def plan_of(self, name: str) -> Plan | None:
        """The plan of this name, else of the longest pattern that fits it.

        A name that says its provider is meant so: a pattern that says none does not fit it.
        """
        if name in self.plans or not self.plans:
            return self.plans.get(name)
        prefix, slash, _ = name.partition("/")
        said = f"{prefix}/" if slash and prefix in self.providers else ""
        fitting = [key for key in self.plans if is_pattern(key) and key.startswith(said) and fnmatchcase(name, key)]
        return self.plans[max(fitting, key=len)] if fitting else None

    def _meant(self, name: str) -> str:
        return self.aliases.get(name, name)

    def _shares(self, name: str) -> list[Share]:
        plan = self.plan_of(name)
        provider, model = self.choose(name)
        if plan and plan.shares:
            return [replace(share, model=model) if share.model == SAME_NAME else share for share in plan.shares]
        return [Share(provider, model)] if provider in self.providers else []

    def _targets(self, shares: Sequence[Share], owner: str, own_credential: str | None) -> Iterator[Target]:
        """Of the providers that can be asked; `owner` is the one that the caller's own credential is for."""
        for share in shares:
            provider = self.providers[share.provider]
            if share.provider == owner and provider.base_url:
                yield Target(provider, share.model, own_credential, own_credential=True, weight=share.weight)
            elif provider.enabled:
                yield Target(provider, share.model, provider.api_key, weight=share.weight)

    def _explain(self, model: str, shares: Sequence[Share]) -> str:
        answering = ", ".join(p.name for p in self.providers.values() if p.enabled) or "none"
        if shares and shares[0].provider != self.default:
            return f"the model {model!r} belongs to {shares[0].provider}, which has no credential here"
        return f"the model {model!r} does not exist here; providers that answer: {answering}"

    def answering(self) -> list[str]:
        """The providers that are on, or may be at any time."""
        return [name for name, provider in self.providers.items() if provider.enabled or provider.probed]

    def with_enabled(self, name: str, enabled: bool) -> "Routes":
        """The same routes with one provider switched on or off (a local server that came or went)."""
        provider = replace(self.providers[name], enabled=enabled)
        return replace(self, providers={**self.providers, name: provider})

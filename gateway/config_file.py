"""A TOML file of providers, models, prices and limits, read table by table: what is wrong names its line and key."""

import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.settings import SettingsError, explain
from gateway.toml_lines import KeyPath, dotted, key_lines, line_of


class ProviderRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[providers.NAME]` table of providers.toml or of the operator's file."""

    dialect: Literal["openai", "anthropic", "ollama"] = "openai"
    base_url: str = ""
    base_url_env: str = ""  # name of the environment variable that takes its place
    base_path: str = "/v1"  # of an OpenAI-compatible server whose address is a bare host
    api_key_env: str = ""  # name of the environment variable that holds the key
    needs_key: bool = True  # off until the variable above is set, or an address is given
    probe_env: str = ""  # name of the environment variable that says where a `probed` one is looked for
    probed: bool = False  # nobody has to say that it is there: it is on while it answers
    insecure: bool = False  # its key may travel over plain http on the internet
    auth: Literal["bearer", "x-api-key", "api-key"] = "bearer"
    headers: dict[str, str] = {}
    query: str = ""
    rules: list[str] = []
    rules_need_key: bool = False  # while it is off its rules do not count: local servers have models of such names
    models: list[str] = []
    label: str = ""
    asks_usage: bool = True
    renames: dict[str, str] = {}
    drops: list[str] = []
    roles: dict[str, str] = {}
    tool_id_length: Annotated[int, Meta(ge=0, le=64)] = 0


class TargetRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    to: str  # `provider/model`
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1


class ModelRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[models."NAME"]` table."""

    targets: list[TargetRow] = []
    fallbacks: Annotated[list[str], Meta(max_length=16)] = []


class RateRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[limits."/v1/…"]` table: a token bucket for all requests to a route."""

    requests_per_second: Annotated[float, Meta(gt=0, le=1e6)]
    burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class ConfigError(SettingsError):
    """All that is wrong with a file, a line each: `gateway.toml:12: aliases.fast: …`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


TABLES = ("aliases", "limits", "models", "prices", "providers")
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")

T = TypeVar("T")


class ConfigFile:
    """One file. What is found wrong with it is collected, and raised by `check` as one ConfigError."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text
        self._lines: dict[KeyPath, int] | None = None  # found when the first problem is
        self._problems: list[tuple[int, str]] = []  # by line
        self._tables = self._parse()

    def _parse(self) -> dict[str, Any]:
        try:
            tables = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"at line (\d+)", str(error))
            line = int(at[1]) if at else self._text.count("\n") + 1
            raise ConfigError([f"{self.name}:{line}: {error}"]) from None
        except RecursionError:
            raise ConfigError([f"{self.name}: nested too deeply"]) from None
        except ValueError:  # https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
            raise ConfigError([f"{self.name}: a number has too many digits"]) from None
        for name, table in tables.items():
            if name not in TABLES:
                self.wrong((name,), f"there is no such table; there are {', '.join(TABLES)}")
            elif not isinstance(table, dict):
                self.wrong((name,), "a table is required")
        return {name: table for name, table in tables.items() if isinstance(table, dict)}

    def table(self, name: str) -> dict[str, Any]:
        """As it was parsed, unchecked."""
        table: dict[str, Any] = self._tables.get(name, {})
        return table

    def rows(self, name: str, kind: type[T], without: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, T]:
        """The rows of a table that are what they should be. `without` says what stands where a row says nothing."""
        rows = {
            key: self._row((name, key), value, kind, (without or {}).get(key))
            for key, value in self.table(name).items()
        }
        return {key: row for key, row in rows.items() if row is not None}

    def _row(self, path: KeyPath, value: Any, kind: type[T], without: Mapping[str, Any] | None) -> T | None:
        if without and isinstance(value, dict):
            value = {**without, **value}
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            where, problem = explain(error)
            path += _steps(where)
            if unknown := _UNKNOWN.fullmatch(problem):
                path += (unknown[1],)
                problem = "there is no such key"
                if _SECRET.search(unknown[1]):
                    problem += "; no secret belongs in this file: api_key_env names the variable that holds a key"
            self.wrong(path, problem)
        return None

    def wrong(self, path: KeyPath, problem: str) -> None:
        self.wrong_at(path, f"{dotted(path)}: {problem}")

    def wrong_at(self, path: KeyPath, words: str) -> None:
        """For words that say the key themselves."""
        if self._lines is None:
            self._lines = key_lines(self._text)
        line = line_of(self._lines, path) or 1
        self._problems.append((line, f"{self.name}:{line}: {words}"))

    def check(self) -> None:
        """Raises ConfigError for all that was found wrong, in the order of the file."""
        if self._problems:
            raise ConfigError([words for _, words in sorted(self._problems, key=lambda problem: problem[0])])


def _steps(where: str) -> KeyPath:
    """`targets[1].to`, as msgspec writes it; `[...]` is a key that it does not name."""
    words = re.findall(r"[^.\[\]]+|\[\d+\]", where.replace("[...]", ""))
    return tuple(int(word[1:-1]) if word.startswith("[") else word for word in words)

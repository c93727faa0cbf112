"""What `make up` asks of the gateway that it started: is it ready, an account, a key, a first stream."""

import http.client
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gateway.local_process import LocalError

_TIMEOUT = 30.0  # seconds for an answer


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def authority(self) -> str:
        """As it stands in a URL (RFC 3986 3.2)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Login:
    base_url: str
    api_key: str
    email: str
    password: str


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes

    @property
    def message(self) -> str:
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"HTTP {self.status}"


def is_ready(address: Address, path: str = "/health/ready") -> bool:
    try:
        return _request(address, "GET", path).status == 200
    except (OSError, http.client.HTTPException):
        return False


def working_login(address: Address, known: Login) -> Login:
    """The known login if its key still works, else a new key, for a new account if need be."""
    if known.api_key and _request(address, "GET", "/v1/models", api_key=known.api_key).status == 200:
        return known
    email, password = _account(address, known.email, known.password)
    return replace(known, api_key=_make_key(address, email, password), email=email, password=password)


def _account(address: Address, email: str, password: str) -> tuple[str, str]:
    """An account that exists: the given one, made if it does not, or another if there was none to give."""
    for candidate in (email or "dev@example.com", f"dev-{secrets.token_hex(4)}@example.com"):
        login = {"email": candidate, "password": password or secrets.token_urlsafe(18)}
        registered = _request(address, "POST", "/auth/register", login)
        if registered.status == 201 or (registered.status == 409 and password):
            return login["email"], login["password"]
        if registered.status != 409:
            break
    raise LocalError(f"The gateway made no account: {registered.message}")


def _make_key(address: Address, email: str, password: str) -> str:
    wanted: dict[str, Any] = {"email": email, "password": password, "key_name": "make up"}
    unlimited = {"requests_per_minute": 0, "concurrent_requests": 0}
    made = _request(address, "POST", "/auth/keys", {**wanted, **unlimited})
    if made.status == 403:  # somebody else is the admin; then the deployment's limits are ours too
        made = _request(address, "POST", "/auth/keys", wanted)
    if made.status != 201:
        raise LocalError(
            f"The gateway made no key: {made.message} Remove .gateway/dev.env to begin with a new account."
        )
    return str(json.loads(made.body)["api_key"])


def stream(address: Address, api_key: str, model: str, question: str) -> Iterator[str]:
    """The text of a completion, each piece when it comes. Raises LocalError when there is none."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    connection, answer = _send(address, "POST", "/v1/chat/completions", body, api_key)
    try:
        if answer.status != 200:
            raise LocalError(_Answer(answer.status, answer.read()).message)
        while line := answer.readline():
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    yield choice["delta"].get("content") or ""
    finally:
        connection.close()


def _request(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, api_key: str = ""
) -> _Answer:
    connection, answer = _send(address, method, path, body, api_key)
    try:
        return _Answer(answer.status, answer.read())
    finally:
        connection.close()


def _send(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None, api_key: str
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    headers = {"Content-Type": "application/json"} if body else {}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_TIMEOUT)
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection, connection.getresponse()

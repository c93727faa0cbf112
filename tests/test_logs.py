import asyncio
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import orjson
import pytest
from aiohttp.http_exceptions import BadHttpMessage

from gateway.exchange import Exchange, Principal
from gateway.logs import LineHandler, exchange_fields, json_line, log_exchange, readable_line, setup, wants_colour
from gateway.protocol.request import parse_chat
from gateway.protocol.routing import Provider, Target
from gateway.protocol.usage import Usage

pytestmark = pytest.mark.unit

log = logging.getLogger("gateway.test")
KEY = "aig_0123456789AB_" + "s" * 43 + "_CRC123"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root, access = logging.getLogger(), logging.getLogger("aiohttp.access")
    handlers, level, flags = list(root.handlers), root.level, (logging.logThreads, logging.logProcesses)
    excepthook = sys.excepthook
    yield
    sys.excepthook = excepthook
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.logThreads, logging.logProcesses = flags
    logging.logMultiprocessing = True
    access.disabled = False
    logging.captureWarnings(False)


def record(message: str = "hello", *arguments: Any, name: str = "gateway.test", **attributes: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, "file.py", 7, message, arguments, attributes.pop("exc_info", None))
    made.__dict__.update(attributes)
    return made


def parsed(made: logging.LogRecord) -> dict[str, Any]:
    line = json_line(made)
    assert line.isprintable()
    fields: dict[str, Any] = orjson.loads(line)
    return fields


def readable(made: logging.LogRecord) -> str:
    return readable_line(colour=False)(made)


def raised(error: BaseException, cause: BaseException | None = None) -> Any:
    try:
        raise error from cause
    except BaseException:
        return sys.exc_info()


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_a_production_line_is_json_with_the_time_the_level_the_message_and_then_the_fields() -> None:
    fields = parsed(record("%s streams", 3, created=1_700_000_000.0625, fields={"request_id": "r1", "status": 200}))
    assert list(fields.items()) == [
        ("timestamp", "2023-11-14T22:13:20.062Z"),
        ("level", "info"),
        ("message", "3 streams"),
        ("request_id", "r1"),
        ("status", 200),
    ]


def test_a_field_cannot_take_the_place_of_the_time_the_level_or_the_message() -> None:
    fields = parsed(record("hello", fields={"message": "bye", "level": "none", "timestamp": 0}))
    assert (fields["message"], fields["level"]) == ("hello", "info")
    assert fields["timestamp"] != 0


def test_a_line_of_a_library_names_it() -> None:
    assert parsed(record(name="asyncpg"))["logger"] == "asyncpg"
    assert "logger" not in parsed(record(name="gateway.relay"))


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (object, str(object)),
        (2**80, 2**80),
        ({1: "one"}, {"1": "one"}),
        ({"a"}, "{'a'}"),
        (float("nan"), None),
    ],
)
def test_any_value_can_be_a_field(value: Any, shown: Any) -> None:
    line = json_line(record(fields={"value": value}))  # read by json, because orjson reads no long integers
    assert json.loads(line)["value"] == shown


def test_half_an_emoji_is_written_as_json_escapes_it() -> None:
    line = json_line(record("half \ud83d", fields={"model": "\udc00"}))
    assert r"half \ud83d" in line
    assert r"\udc00" in line


@pytest.mark.parametrize("char", ["\n", "\r", "\x1b", "\x00", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066"])
def test_a_control_character_cannot_forge_a_line_or_reach_a_terminal(char: str) -> None:
    text = f"before{char}after"
    made = record("said %s", text, fields={"user_id": text})
    assert parsed(made)["user_id"] == text
    assert parsed(made)["message"] == f"said {text}"
    assert char not in readable(made)
    assert len(readable(made).splitlines()) == 1


def test_an_exception_in_production_says_what_and_where_and_quotes_nothing() -> None:
    told = parsed(record("failed", exc_info=raised(ValueError("the prompt"), KeyError("the key"))))["exception"]
    first, place, second = told.split("\n")
    assert (first, second) == ("ValueError", "caused by KeyError")
    assert re.fullmatch(r"  .*test_logs\.py:\d+ raised", place)


def test_the_systems_own_errors_are_logged_with_their_text() -> None:
    told = parsed(record("failed", exc_info=raised(ConnectionRefusedError(111, "refused"))))["exception"]
    assert told.startswith("ConnectionRefusedError: [Errno 111] refused\n")


def test_an_endless_chain_of_causes_ends() -> None:
    error = OSError("first")
    for number in range(50):
        outer = OSError(str(number))
        outer.__context__ = error
        error = outer
    assert parsed(record("failed", exc_info=(OSError, error, None)))["exception"].count("OSError") == 5


# --- what is never logged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "secret", "kept"),
    [
        (f"refused {KEY}", KEY[17:], "aig_0123456789AB_***"),
        ("got sk-proj-abcdefgh12345678", "abcdefgh", "sk-***"),
        ("Authorization: Bearer abc.def-123456789=", "abc.def", "Bearer ***"),
        ("postgresql://gateway:hunter22@db:5432/x", "hunter22", "postgresql://gateway:***@db:5432/x"),
        ("postgresql://gateway:hun@ter/22@db:5432/x", "ter", "postgresql://gateway:***@db:5432/x"),
        ("refused: redis://:hun/ter22@cache:6379/0", "hun/ter22", "redis://:***@cache:6379/0"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz", "Basic ***"),
        ("Cookie: aig_session=" + "s" * 43, "sss", "aig_session=***"),
        ("x-api-key: 0123456789abcdef", "0123456789abcdef", "x-api-key: ***"),
        ("{'X-Api-Key': '0123456789abcdef'}", "0123456789abcdef", "{'X-Api-Key': '***'}"),
    ],
)
def test_what_looks_like_a_credential_is_masked(text: str, secret: str, kept: str) -> None:
    for made in (record(text), record("see", fields={"user_id": text}), record("x", exc_info=raised(OSError(text)))):
        for line in (json_line(made), readable(made)):
            assert secret not in line
            assert kept in line
        parsed(made)


def test_plain_words_and_a_keys_prefix_are_not_masked() -> None:
    text = (
        "bearer authentication of aig_0123456789AB at https://example.org:8080/a task-force, "
        "basic authentication, a key in `X-API-Key` or api-key: none"
    )
    assert parsed(record(text))["message"] == text


def test_aiohttps_errors_do_not_print_the_request() -> None:
    error = BadHttpMessage("Invalid header value char:\n\n  b'Authorization: secret'\n  ^")
    made = record("Error handling request from %s", "10.0.0.1", name="aiohttp.server", exc_info=raised(error))
    for line in (json_line(made), readable(made)):
        assert "secret" not in line
        assert "Error handling request from 10.0.0.1" in line
        assert "BadHttpMessage" in line


async def test_asyncios_reprs_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise ValueError("the prompt")

    setup("info", "development")
    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    logging.getLogger().handlers[-1].flush()
    written = capsys.readouterr().err
    assert "Task exception was never retrieved" in written
    assert "the prompt" not in written


# --- for people ---------------------------------------------------------------------------------------------------


def test_a_development_line_is_read_at_a_glance() -> None:
    line = readable(
        record("GET %s", "/health", name="gateway.access", fields={"status": 200, "model": None, "note": "a b"})
    )
    assert re.fullmatch(r'\d\d:\d\d:\d\d\.\d{3}  info     access  GET /health  status=200  note="a b"', line)


def test_a_development_exception_is_told_in_full_below_its_line() -> None:
    lines = readable(record("failed", exc_info=raised(ValueError("bad\nvalue"), OSError("disk")))).split("\n")
    assert [lines[1], lines[3]] == [r"    ValueError: bad\u000avalue", "    caused by OSError: disk"]
    assert re.fullmatch(r"      .*test_logs\.py:\d+ raised", lines[2])


def test_only_a_terminal_gets_colours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    setup("info", "development")
    log.warning("plain")
    assert "\x1b" not in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup("info", "development")
    log.warning("coloured")
    assert "\x1b[33mwarning\x1b[0m" in terminal.getvalue()
    setup("info", "production")
    log.warning("json")
    assert "\x1b" not in terminal.getvalue().splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "colour"),
    [
        (Terminal(), {}, True),
        (io.StringIO(), {}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"NO_COLOR": "0"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        (io.StringIO(), {"FORCE_COLOR": ""}, False),
        (Terminal(), {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_no_color_and_force_color_are_honoured(stream: io.StringIO, environ: dict[str, str], colour: bool) -> None:
    assert wants_colour(stream, environ) is colour


# --- logging never raises -----------------------------------------------------------------------------------------


def set_up_alone(environment: str) -> None:
    """Without pytest's own handlers, which raise what a record raises."""
    logging.getLogger().handlers.clear()
    setup("info", environment)


def test_arguments_that_do_not_fit_leave_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_alone("production")
    log.info("%s and %s", "one")
    log.info("%d", "none")
    messages = [orjson.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["%s and %s", "%d"]


@pytest.mark.parametrize("environment", ["production", "development"])
def test_a_record_that_cannot_be_rendered_still_leaves_a_line(
    environment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_alone(environment)
    log.info("%s", Unprintable())
    log.info("field", extra={"fields": {"value": Unprintable()}})
    log.info("no mapping", extra={"fields": ["a", "list"]})
    first, second, third = capsys.readouterr().err.splitlines()
    assert "gateway.test cannot be rendered: RuntimeError" in first
    assert "gateway.test cannot be rendered" in second
    assert "no mapping" in third


def test_a_closed_stderr_is_no_error() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream, json_line)
    stream.close()
    handler.emit(record())


# --- setting up ---------------------------------------------------------------------------------------------------


def test_setting_up_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
    setup("debug", "development")
    setup("info", "production")
    log.info("once")
    log.debug("never")
    assert [orjson.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["once"]


def test_handlers_of_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    setup("info", "production")
    log.info("seen by both")
    assert "seen by both" in caplog.text


def test_warnings_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup("info", "production")
        warnings.warn("careful", stacklevel=1)
        logging.captureWarnings(False)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"test_logs\.py:\d+: UserWarning: careful$", orjson.loads(line)["message"])


def test_aiohttps_access_log_is_off() -> None:
    setup("debug", "production")
    assert not logging.getLogger("aiohttp.access").isEnabledFor(logging.INFO)


# --- the line of an exchange --------------------------------------------------------------------------------------


@pytest.fixture
def exchange() -> Exchange:
    chat = parse_chat(b'{"model":"fast","messages":[{"role":"user","content":"the prompt"}],"stream":true}')
    provider = Provider("example", "openai", "https://provider.example/v1", api_key="sk-secret")
    now = monotonic()
    return Exchange(
        id="r1",
        started=now - 2,
        client_request_id="c1",
        principal=Principal("0123456789AB", "aig_0123456789AB", "laptop", "account", "member"),
        user_id="u1",
        app_id="a1",
        own_credential="sk-own",
        asked=chat,
        target=Target(provider, "gpt-x", credential="sk-secret"),
        model="fast",
        outcome="ok",
        status=200,
        first_byte=now - 1.75,
        ended=now - 0.5,
    )


def test_the_line_of_an_exchange_has_these_fields_in_this_order(exchange: Exchange) -> None:
    fields = exchange_fields(exchange, Usage(10, 4), "provider")
    assert list(fields.items()) == [
        ("request_id", "r1"),
        ("client_request_id", "c1"),
        ("model", "fast"),
        ("provider", "example"),
        ("status", 200),
        ("latency_ms", 1500),
        ("ttft_ms", 250),
        ("prompt_tokens", 10),
        ("completion_tokens", 4),
        ("total_tokens", 14),
        ("usage_source", "provider"),
        ("cost_micros", None),
        ("key", "aig_0123456789AB"),
        ("user_id", "u1"),
        ("app_id", "a1"),
        ("outcome", "ok"),
        ("error_code", None),
        ("stream", True),
    ]


def test_the_line_of_an_exchange_says_who_else_was_asked(exchange: Exchange) -> None:
    exchange.headers["X-Gateway-Attempts"] = "example=ok"
    assert "attempts" not in exchange_fields(exchange, None, "")
    exchange.headers["X-Gateway-Attempts"] = "openai=http_5xx, example=ok"
    assert exchange_fields(exchange, None, "")["attempts"] == "openai=http_5xx, example=ok"


def test_the_line_of_an_exchange_has_no_prompt_and_no_key(exchange: Exchange) -> None:
    made = record("POST", fields={"method": "POST", "path": "/v1/chat", **exchange_fields(exchange, None, "")})
    for line in (json_line(made), readable(made)):
        assert "the prompt" not in line
        assert "sk-" not in line


def test_a_request_that_was_refused_at_the_door_has_a_line_with_what_is_known() -> None:
    fields = exchange_fields(Exchange(id="r2", status=401, error_code="invalid_api_key"), None, "")
    assert "client_request_id" not in fields
    assert fields["latency_ms"] >= 0
    known = {name: value for name, value in fields.items() if value is not None and name != "latency_ms"}
    assert known == {"request_id": "r2", "status": 401, "error_code": "invalid_api_key"}


def test_a_stream_that_runs_backwards_in_time_took_no_time(exchange: Exchange) -> None:
    early = replace(exchange, first_byte=exchange.started - 1, ended=exchange.started - 1)
    fields = exchange_fields(early, None, "")
    assert (fields["latency_ms"], fields["ttft_ms"]) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client_request_id": ""},
        {"model": "sk-0123456789abcdef"},
        {"user_id": "Bearer 0123456789abcdef"},
        {"client_request_id": KEY},
        {"app_id": "https://me:secret@example.com"},
        {"model": "two\nlines \u202e and \ud800"},
        {"model": 'quoted "\\'},
        {"cost_micros": 10**30},
        {"target": None, "status": 0},
    ],
)
def test_the_line_of_an_exchange_is_the_one_that_logging_writes(
    exchange: Exchange, changes: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, usage = replace(exchange, **changes), Usage(10, 4)
    now = 1_763_775_443.9567
    monkeypatch.setattr("gateway.logs.time", lambda: now)
    set_up_alone("production")
    log_exchange("POST", "/v1/chat", done, usage, "provider")
    fields = {"method": "POST", "path": "/v1/chat", **exchange_fields(done, usage, "provider")}
    made = record("POST /v1/chat %s", done.status or "-", name="gateway.access", fields=fields, created=now)
    assert capsys.readouterr().err == json_line(made) + "\n"


async def test_what_waits_to_be_written_of_an_exchange_holds_no_prompt(
    exchange: Exchange, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody reads stderr thousands of lines wait: of each the fields, and not the exchange."""
    monkeypatch.setattr("gateway.lines.LINGER", 60)
    set_up_alone("production")
    before = sys.getrefcount(exchange), sys.getrefcount(exchange.asked)
    log_exchange("POST", "/v1/chat", exchange, None, "")
    assert (sys.getrefcount(exchange), sys.getrefcount(exchange.asked)) == before
    assert capsys.readouterr().err == ""
    logging.getLogger().handlers[0].flush()
    assert '"request_id":"r1"' in capsys.readouterr().err


def test_in_development_or_with_other_handlers_it_is_a_record_like_any(
    exchange: Exchange, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    setup("info", "production")
    log_exchange("POST", "/v1/chat", exchange, None, "")
    assert caplog.messages == ["POST /v1/chat 200"]
    set_up_alone("development")
    log_exchange("POST", "/v1/chat", exchange, None, "")
    assert "  200       1.50 s  POST /v1/chat              fast → example  first 250 ms" in capsys.readouterr().err


def test_no_line_of_an_exchange_is_written_where_only_warnings_are(
    exchange: Exchange, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().handlers.clear()
    setup("warning", "production")
    log_exchange("POST", "/v1/chat", exchange, None, "")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("at", [0.0, 1_763_775_443.0, 1_763_775_443.9995, 1_763_775_444.001])
def test_a_timestamp_is_that_of_rfc_3339(at: float) -> None:
    expected = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert parsed(record(created=at))["timestamp"] == expected


# --- the same for people ------------------------------------------------------------------------------------------


def told(done: Exchange, usage: Usage | None = None, source: str = "", *, colour: bool = False) -> str:
    """The line of an exchange in development, without its time."""
    fields = {"method": "POST", "path": "/v1/chat/completions", **exchange_fields(done, usage, source)}
    line = readable_line(colour=colour)(record(name="gateway.access", fields=fields))
    return line.partition("  ")[2]


def test_in_development_an_exchange_is_told_in_one_line_that_ends_with_its_id(exchange: Exchange) -> None:
    exchange.cost_micros = 1_200
    assert told(exchange, Usage(12, 345), "provider") == (
        "200       1.50 s  POST /v1/chat/completions  fast → example  first 250 ms  12→345 tokens  $0.0012"
        "  key aig_0123456789AB  user u1  app a1  client id c1  id r1"
    )


def test_what_is_not_known_of_an_exchange_is_left_out() -> None:
    refused = Exchange(id="r2", status=401, error_code="invalid_api_key", started=0.0, ended=0.004)
    assert told(refused) == "401         4 ms  POST /v1/chat/completions  invalid_api_key  id r2"


def test_lines_of_exchanges_stand_in_columns(exchange: Exchange) -> None:
    slow = replace(exchange, ended=exchange.started + 72.3)
    lines = [told(done) for done in (exchange, slow, Exchange(id="r2", status=404), Exchange(id="r3"))]
    assert len({line.index("POST") for line in lines}) == 1
    assert [line.split()[0] for line in lines] == ["200", "200", "404", "-"]


@pytest.mark.parametrize(
    ("changes", "words", "colour"),
    [
        ({}, "", "\x1b[32m"),
        ({"status": 404, "outcome": "", "error_code": "model_not_found"}, "model_not_found", "\x1b[33m"),
        (
            {"outcome": "upstream_error", "error_code": "upstream_truncated"},
            "upstream_error: upstream_truncated",
            "\x1b[31m",
        ),
        ({"outcome": "budget_exhausted"}, "budget_exhausted", "\x1b[33m"),
        ({"status": 0, "outcome": "client_abort"}, "client_abort", "\x1b[33m"),
        ({"status": 503, "outcome": "", "error_code": "overloaded"}, "overloaded", "\x1b[31m"),
        ({"status": 304, "outcome": ""}, "", "\x1b[36m"),
    ],
)
def test_how_an_exchange_ended_is_said_and_has_its_colour(
    exchange: Exchange, changes: dict[str, Any], words: str, colour: str
) -> None:
    done = replace(exchange, **changes)
    assert (f"fast → example  {words}  first" if words else "fast → example  first") in told(done)
    line = told(done, colour=True)
    assert line.startswith(f"{colour}{done.status or '-':<7}\x1b[0m  ")
    assert not words or f"{colour}{words}\x1b[0m" in line


def test_a_count_that_is_not_the_providers_says_so(exchange: Exchange) -> None:
    assert "  9→4 tokens (estimated)  " in told(exchange, Usage(9, 4), "estimated")


@pytest.mark.parametrize(
    ("micros", "shown"), [(0, "$0.00"), (7, "$0.000007"), (1_200_000, "$1.20"), (12_345_678, "$12.345678")]
)
def test_a_cost_is_shown_in_dollars_with_all_its_digits(exchange: Exchange, micros: int, shown: str) -> None:
    assert f"  {shown}  key" in told(replace(exchange, cost_micros=micros))


def test_other_providers_that_were_asked_are_named(exchange: Exchange) -> None:
    exchange.headers["X-Gateway-Attempts"] = "openai=http_5xx, example=ok"
    assert '  tried "openai=http_5xx, example=ok"  ' in told(exchange)


@pytest.mark.parametrize("field", ["model", "user_id", "app_id", "client_request_id"])
@pytest.mark.parametrize("char", ["\n", "\x1b", "\x9b", "\u2028", "\u202e", "\ud800"])
def test_nothing_that_a_client_sends_forges_a_part_of_a_development_line(
    exchange: Exchange, field: str, char: str
) -> None:
    setattr(exchange, field, f"x  $0.00  key aig_999{char}id r2")
    line = told(exchange, colour=True)
    assert len(line.splitlines()) == 1
    assert char not in line.replace("\x1b[2m", "").replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert '"x  $0.00  key aig_999' in line, "in quotes, so that it is not taken for ours"


@pytest.mark.parametrize("field", ["model", "user_id", "app_id", "client_request_id"])
def test_a_credential_in_a_development_line_is_masked(exchange: Exchange, field: str) -> None:
    for secret in (KEY, "sk-proj-abcdefgh-secret1", "Bearer abc.def-secret12="):
        setattr(exchange, field, secret)
        line = told(exchange, colour=True)
        assert secret[-8:] not in line
        assert "***" in line

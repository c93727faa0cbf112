"""The `gateway` command."""

import argparse
import asyncio
import gc
import os
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gateway import __version__
from gateway.commands import accounts, config, usage
from gateway.commands.database import Rows, add_json, failed, print_rows, with_servers
from gateway.protocol.errors import GatewayError
from gateway.settings import Settings, SettingsError, change, load_settings

# The server's modules are imported by the commands that need them: `gateway --help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words).parse_args(words)
    try:
        settings = load_settings(os.environ)
        result: int = arguments.run(arguments, settings)
        return result
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    except GatewayError as error:
        return failed(error.message)
    except KeyboardInterrupt:
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="One OpenAI-compatible base URL in front of OpenAI, Anthropic, Ollama and every compatible server.",
        epilog="Settings are environment variables; the README lists them. `gateway COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"gateway {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), "")
    for name, (words, describe) in _commands().items():
        command = commands.add_parser(name, help=words)
        if name == asked:  # what the others would say is not read, and would have to be imported
            describe(command)
    return parser


def _commands() -> dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]:
    return {
        "serve": ("run the gateway", _describe_serve),
        "mock": ("run a provider that answers without the internet", _describe_mock),
        "users": ("list, create and limit accounts", accounts.describe_users),
        "keys": ("list, create, change and revoke keys", accounts.describe_keys),
        "usage": ("what was used", usage.describe_usage),
        "config": ("check the operator's file", config.describe_config),
        "migrate": ("bring the database's tables up to date", _describe_migrate),
    }


# --- serve and mock -----------------------------------------------------------------------------------------------


def _describe_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the gateway in the foreground. Without DATABASE_URL and REDIS_URL it starts a Postgres and a Valkey of "
        "its own in GATEWAY_DATA_DIR. SIGTERM lets open streams finish, SIGHUP reads the configuration again, SIGUSR2 "
        "replaces workers one by one."
    )
    parser.add_argument("--host", help="address to listen on (HOST)")
    parser.add_argument("--port", help="port to listen on (PORT)")
    parser.add_argument("--workers", help="processes that serve; 0: one for each core (GATEWAY_WORKERS)")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.logs import setup
    from gateway.supervisor import StartError, handed_over, supervise, workers_of

    given = {name: getattr(arguments, name) for name in ("host", "port")} | {"gateway_workers": arguments.workers}
    settings = change(settings, {name: value for name, value in given.items() if value is not None})
    setup(settings.log_level, settings.environment)
    handover = handed_over(os.environ)
    try:
        if handover is None and workers_of(settings) > 1:
            return supervise(settings, os.environ, _say_ready)
        gc.disable()  # what is imported now is kept for ever; the application sets it on purpose once it is up
        with _nothing_unused():
            from gateway.serve import serve

        serve(settings, os.environ, _say_ready if handover is None else lambda address: None, handover)
    except StartError as error:
        return failed(str(error))
    return 0


@contextmanager
def _nothing_unused() -> Iterator[None]:
    """Keeps libraries from what they do while they are imported and we never use: aiohttp's client reads the system's
    authorities twice (60 ms, 2 MB; as it is now it would trust nobody), redis-py imports OpenTelemetry where it is
    installed (30 ms, 3 MB)."""
    unread = "opentelemetry" not in sys.modules
    ssl.SSLContext.set_default_verify_paths = lambda self: None  # type: ignore[method-assign]
    if unread:
        sys.modules["opentelemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del ssl.SSLContext.set_default_verify_paths  # the inherited one is there again
        if unread:
            del sys.modules["opentelemetry"]


def _say_ready(address: str) -> None:
    print(f"gateway: ready on {address}/v1", flush=True)


def _describe_mock(parser: argparse.ArgumentParser) -> None:
    from gateway.mock import HELP

    parser.description = "Run the mock provider: it speaks OpenAI's, Anthropic's and Ollama's wire formats."
    parser.epilog = HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8100, help="port to listen on (8100)")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="milliseconds between two tokens (0)")
    parser.set_defaults(run=_mock)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a number from 0 to 65535 is required")
    return int(text)


def _mock(arguments: argparse.Namespace, settings: Settings) -> int:
    import signal

    import uvloop

    from gateway.mock import serve

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(
            arguments.host,
            arguments.port,
            arguments.pace_ms,
            stop,
            lambda address: print(f"gateway: mock provider on {address}", flush=True),
        )

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except OSError as error:
        return failed(f"the mock provider cannot start: {error}")
    return 0


# --- migrate -------------------------------------------------------------------------------------------------------


def _describe_migrate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Apply the migrations that are missing, as `gateway serve` does. Several at once are safe."
    add_json(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.stores.migrations import migrate

    async def work(database_url: str, redis_url: str) -> Rows:
        return [{"applied": name} for name in await migrate(database_url)]

    return print_rows(with_servers(settings, work), arguments.json)


if __name__ == "__main__":
    sys.exit(main())

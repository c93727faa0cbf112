"""`gateway config check`: is the operator's file right, and what does it mean?"""

import argparse
import os

from gateway.protocol.errors import ModelNotFound
from gateway.protocol.routing import Routes, is_pattern
from gateway.settings import Settings, change


def describe_config(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read a configuration as `gateway serve` and a SIGHUP do, with this environment's keys and addresses. What is "
        "wrong with it is said with its line, and the exit status is 2; else who answers for which name is shown."
    )
    parser.add_argument("action", choices=["check"], help="check: read it, and change nothing")
    parser.add_argument("file", nargs="?", help="the file to read (GATEWAY_CONFIG)")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    from gateway.config import load_config, wants_mock, with_mock

    if arguments.file is not None:
        settings = change(settings, {"gateway_config": arguments.file})
    routes = load_config(settings, os.environ).routes
    routes = with_mock(routes, "") if wants_mock(settings) else routes
    print(f"{settings.gateway_config or 'no file: the shipped configuration'}: right")
    print(f"providers: {', '.join(routes.answering()) or 'none'}")
    for name in [*routes.aliases, *(name for name in routes.plans if not is_pattern(name))]:
        print(f"{name}: {_route(routes, name)}")
    return 0


def _route(routes: Routes, name: str) -> str:
    """`openai/gpt-4o x3 | azure/gpt-4o, then anthropic/claude-opus-5`."""
    try:
        groups = routes.resolve(name)
    except ModelNotFound as error:
        return f"nobody, because {error.message}"
    return ", then ".join(
        " | ".join(
            f"{target.provider.name}/{target.model}" + (f" x{target.weight}" if target.weight > 1 else "")
            for target in group
        )
        for group in groups
    )

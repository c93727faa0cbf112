"""What hangs on the application and on a request, with its type. `app.py` opens and closes every one of these.

Handlers read them as `request.app[KEYS]`; whatever runs with every request to a model as `request[APP].limiter`, at a
sixth of the price.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import asyncpg
from aiohttp import web

from gateway.balancer import Balancer
from gateway.catalogue import Catalogue
from gateway.connection import CONNECTIONS as CONNECTIONS
from gateway.exchange import Exchange
from gateway.metrics import Metrics
from gateway.pressure import Pressure
from gateway.protocol.pricing import PriceTable
from gateway.pulse import Pulse
from gateway.settings import Settings
from gateway.stores.accounts import AccountStore
from gateway.stores.belongings import Belongings
from gateway.stores.budgets import Budgets
from gateway.stores.copy import UsageCopy
from gateway.stores.keeper import Keeper
from gateway.stores.keys import KeyStore
from gateway.stores.limits import Limiter
from gateway.stores.outages import Outages
from gateway.stores.recorder import Recorder
from gateway.stores.script import RedisScript
from gateway.stores.sessions import SessionStore
from gateway.stores.shipper import Shipper
from gateway.stores.streams import Streams
from gateway.upstream import Upstream

if TYPE_CHECKING:  # it imports OpenTelemetry
    from gateway.tracing import ServerSpan, Tracing

SETTINGS = web.AppKey("SETTINGS", Settings)
ENVIRON = web.AppKey[Mapping[str, str]]("ENVIRON")  # what a reload reads again: names of keys and addresses
RATES = web.AppKey[dict[str, tuple[float, int]]]("RATES")  # of routes; the limiter reads it at each request
POOL = web.AppKey("POOL", asyncpg.Pool)
ACCOUNTS = web.AppKey("ACCOUNTS", AccountStore)
SESSIONS = web.AppKey("SESSIONS", SessionStore)
KEYS = web.AppKey("KEYS", KeyStore)
KEEPER = web.AppKey("KEEPER", Keeper)
BELONGINGS = web.AppKey("BELONGINGS", Belongings)
STREAMS = web.AppKey("STREAMS", Streams)
SCRIPT = web.AppKey("SCRIPT", RedisScript)
LIMITER = web.AppKey("LIMITER", Limiter)
BUDGETS = web.AppKey("BUDGETS", Budgets)
PRICES = web.AppKey("PRICES", PriceTable)
COPY = web.AppKey[UsageCopy | None]("COPY")
RECORDER = web.AppKey("RECORDER", Recorder)
SHIPPER = web.AppKey("SHIPPER", Shipper)
METRICS = web.AppKey("METRICS", Metrics)
CATALOGUE = web.AppKey("CATALOGUE", Catalogue)
BALANCER = web.AppKey("BALANCER", Balancer)
OUTAGES = web.AppKey("OUTAGES", Outages)
PULSE = web.AppKey("PULSE", Pulse)
PRESSURE = web.AppKey("PRESSURE", Pressure)
UPSTREAM = web.AppKey("UPSTREAM", Upstream)

TRACING: "web.AppKey[Tracing | None]" = web.AppKey("TRACING")  # None: no traces are made


class Parts:
    """What requests to models use of the application, looked up once: when all of it is open."""

    __slots__ = (
        "balancer", "budgets", "catalogue", "limiter", "metrics", "prices", "pulse", "recorder", "settings", "tracing",
        "upstream",
    )  # fmt: skip

    def __init__(self, app: web.Application) -> None:
        self.balancer = app[BALANCER]
        self.budgets = app[BUDGETS]
        self.catalogue = app[CATALOGUE]
        self.limiter = app[LIMITER]
        self.metrics = app[METRICS]
        self.prices = app[PRICES]
        self.pulse = app[PULSE]
        self.recorder = app[RECORDER]
        self.settings = app[SETTINGS]
        self.tracing = app[TRACING]
        self.upstream = app[UPSTREAM]


PARTS = web.AppKey("PARTS", Parts)

APP = web.RequestKey("APP", Parts)
EXCHANGE = web.RequestKey("EXCHANGE", Exchange)
SPAN: "web.RequestKey[ServerSpan]" = web.RequestKey("SPAN")  # of requests of /v1, where there are traces

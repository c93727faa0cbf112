"""Puts the application together. The only place that opens and closes things."""

import asyncio
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway import appkeys as keys
from gateway import middlewares
from gateway.balancer import Balancer
from gateway.catalogue import Catalogue
from gateway.config import Config, load_config, wants_mock, with_mock
from gateway.connection import Connections
from gateway.databases import close_database, connect_database, open_redis, patiently
from gateway.embedded import open_database
from gateway.exchange import Budget
from gateway.handlers import (
    accounts,
    cache,
    chat,
    dashboard,
    health,
    live,
    models,
    passthrough,
    sessions,
    stats,
    streams,
)
from gateway.metrics import Metrics
from gateway.pressure import Pressure
from gateway.protocol.errors import Unavailable
from gateway.protocol.pricing import PriceTable
from gateway.protocol.routing import Routes
from gateway.pulse import Pulse
from gateway.reload import show_health
from gateway.revocation import end_revoked
from gateway.settings import Settings, SettingsError
from gateway.sharing import SHARING, Sharing
from gateway.stores.accounts import AccountStore
from gateway.stores.answers import Answers
from gateway.stores.belongings import Belongings
from gateway.stores.budgets import Budgets
from gateway.stores.chain import load_audit_key
from gateway.stores.copy import UsageCopy
from gateway.stores.grants import Rates
from gateway.stores.journal import Journal
from gateway.stores.keeper import Keeper
from gateway.stores.key_limits import MICROS
from gateway.stores.key_rows import read_proofs
from gateway.stores.keys import KeyStore
from gateway.stores.limits import Limiter
from gateway.stores.outages import Outages
from gateway.stores.passwords import HashingPool
from gateway.stores.recorder import Recorder
from gateway.stores.script import RedisScript
from gateway.stores.secrets import deployment_id, load_pepper
from gateway.stores.sessions import SessionStore
from gateway.stores.shipper import Shipper
from gateway.stores.streams import Streams
from gateway.tokeniser import Tokeniser
from gateway.upstream import Upstream

if TYPE_CHECKING:  # it imports OpenTelemetry
    from gateway.tracing import Tracing

log = logging.getLogger("gateway")

BEGIN_ANEW = 1.0  # seconds after which a background task that failed is begun once more
CANCEL_AGAIN = 0.2  # seconds
KEEP = 2.0  # seconds that answers may take to be kept when we stop
FLUSH = 10.0  # seconds that usage rows may take to reach Postgres when we stop
_M_MMAP_THRESHOLD = -3  # malloc.h


def make_app(settings: Settings, environ: Mapping[str, str], *, settle: bool = False) -> web.Application:
    """The whole application, not yet open; `settle` tunes this process's memory for it. Raises SettingsError."""
    tracing = _tracing(settings)
    outermost = [] if tracing is None else [middlewares.traced(tracing)]
    app = web.Application(middlewares=[*outermost, middlewares.errors, *middlewares.V1])
    app[keys.TRACING] = tracing
    app[keys.SETTINGS] = settings
    app.on_response_prepare.append(middlewares.on_prepare)
    app[keys.ENVIRON] = environ
    config = load_config(settings, environ)

    app.add_routes([*chat.routes(), *models.routes(), *streams.routes(), *passthrough.routes()])
    app.add_routes([*health.routes(), *accounts.routes(), *sessions.routes(), *stats.routes(), *dashboard.routes()])
    app.add_routes([*live.routes(), *cache.routes()])

    # Opened in this order, closed in the reverse one: the writers drain while the pools are open.
    opened = [_stores(settings, config), _providers(settings, config.routes), *([_settled] if settle else []), _tasks]
    if tracing is not None:
        opened.insert(0, _traces)
    app.cleanup_ctx.extend(opened)
    return app


# --- what is opened -----------------------------------------------------------------------------------------------

Context = Callable[[web.Application], AsyncIterator[None]]


def _tracing(settings: Settings) -> "Tracing | None":
    """Raises SettingsError."""
    if settings.gateway_traces == "off":
        return None
    try:
        from gateway.tracing import Tracing  # not without need: a third of a second and 26 MB
    except ModuleNotFoundError:
        words = "OpenTelemetry is not installed; `pip install 'ai-gateway[otel]'` does it"
        raise SettingsError(f"GATEWAY_TRACES: {words}") from None
    return Tracing()


async def _traces(app: web.Application) -> AsyncIterator[None]:
    tracing = app[keys.TRACING]
    assert tracing is not None
    tracing.open()
    yield
    await tracing.close()


def _stores(settings: Settings, config: Config) -> Context:
    async def context(app: web.Application) -> AsyncIterator[None]:
        async with AsyncExitStack() as opened:  # a start that fails half-way closes what it has
            database_url, redis_url = await opened.enter_async_context(open_database(settings))
            pool = app[keys.POOL] = await connect_database(database_url)
            opened.push_async_callback(close_database, pool)
            redis = open_redis(redis_url)
            opened.push_async_callback(redis.aclose)
            with suppress(RedisError, OSError):  # the first request should not pay for the connection
                await redis.ping()
            app[keys.METRICS] = metrics = Metrics(providers=config.routes.answering())
            _show_pool(pool, metrics)
            # A pool each: while passwords are guessed, keys are still verified.
            for_keys, for_passwords = HashingPool(), HashingPool()
            opened.callback(for_keys.close)
            opened.callback(for_passwords.close)
            app[keys.ACCOUNTS] = AccountStore(pool, hashing=for_passwords)
            app[keys.SESSIONS] = SessionStore(pool)
            app[keys.KEEPER] = _keeper(settings, pool, metrics)
            app[keys.BELONGINGS] = Belongings(pool)
            app[keys.KEYS] = await _key_store(settings, pool, redis, for_keys, metrics)
            with suppress(Unavailable):  # a connection's first look-up takes five times as long as the next
                await read_proofs(pool, [])
            app[keys.SCRIPT] = RedisScript(
                redis, on_error=lambda kind: metrics.dependency_errors.labels("redis", kind).inc()
            )
            app[keys.STREAMS] = _streams(settings, redis, app[keys.SCRIPT], metrics)
            app[keys.RATES] = rates = dict(config.rates)
            app[keys.LIMITER] = _limiter(settings, rates, app[keys.SCRIPT], metrics)
            app[keys.OUTAGES] = Outages(redis)
            await _open_usage(app, opened, settings, redis, config.prices)
            yield

    return context


def _show_pool(pool: asyncpg.Pool, metrics: Metrics) -> None:
    metrics.pool_connections.labels("idle").follow(pool.get_idle_size)
    metrics.pool_connections.labels("used").follow(lambda: pool.get_size() - pool.get_idle_size())
    metrics.pool_size_max.follow(pool.get_max_size)


async def _key_store(
    settings: Settings, pool: asyncpg.Pool, redis: Redis, hashing: HashingPool, metrics: Metrics
) -> KeyStore:
    return KeyStore(
        pool,
        redis,
        pepper=await patiently(lambda: load_pepper(pool, settings.gateway_key_pepper)),
        cache_seconds=settings.gateway_key_cache,
        stale_seconds=settings.gateway_key_stale,
        hashing=hashing,
        on_read=metrics.key_lookups.inc,
        on_error=lambda: metrics.dependency_errors.labels("postgres", "unavailable").inc(),
    )


def _keeper(settings: Settings, pool: asyncpg.Pool, metrics: Metrics) -> Keeper:
    return Keeper(
        Answers(pool, max_bytes=settings.gateway_cache_max_bytes),
        max_answer=settings.gateway_cache_max_answer,
        max_bytes=settings.gateway_cache_max_bytes,
        on_result=lambda result: metrics.cache_answers.labels(result).inc(),
        on_error=lambda kind: metrics.dependency_errors.labels("postgres", kind).inc(),
    )


def _streams(settings: Settings, redis: Redis, script: RedisScript, metrics: Metrics) -> Streams:
    return Streams(
        redis,
        max_bytes=settings.gateway_resume_max_bytes,
        max_streams=settings.gateway_resume_max_streams,
        ttl=settings.gateway_resume_ttl,
        on_result=lambda result: metrics.resumable_streams.labels(result).inc(),
        on_error=lambda kind: metrics.dependency_errors.labels("redis", kind).inc(),
        gone=lambda: script.gone,
    )


def _limiter(settings: Settings, rates: Rates, script: RedisScript, metrics: Metrics) -> Limiter:
    limiter = Limiter(
        script,
        global_per_minute=settings.gateway_global_requests_per_minute,
        rates=rates,
        nodes=settings.gateway_nodes,
        on_redis_down=settings.gateway_on_redis_down,
        on_local=lambda mode: metrics.fail_mode.labels("limits", mode).inc(),
    )
    metrics.clock_skew_seconds.follow(lambda: abs(script.clock_ahead))
    metrics.limiter_local.follow(lambda: float(limiter.state != "redis"))
    return limiter


async def _open_usage(
    app: web.Application, opened: AsyncExitStack, settings: Settings, redis: Redis, prices: PriceTable
) -> None:
    """What becomes of usage: counted, recorded in a journal, perhaps copied, and shipped to the ledger."""
    pool, metrics = app[keys.POOL], app[keys.METRICS]
    root = Path(settings.gateway_data_dir) / "journal" / await patiently(lambda: deployment_id(pool))
    journal = Journal(root, fsync=settings.gateway_fsync)
    opened.callback(journal.close)
    tokeniser = Tokeniser()
    opened.push_async_callback(tokeniser.close)
    app[keys.COPY] = copy = _copy(app, redis, journal)
    app[keys.PRICES] = prices
    app[keys.RECORDER] = recorder = Recorder(
        journal, prices.price, count=tokeniser.count, copy=copy, on_full=settings.gateway_on_journal_full
    )
    app[keys.BUDGETS] = budgets = Budgets(
        app[keys.SCRIPT],
        pool,
        flushed=lambda: app[keys.SHIPPER].flushed(),
        deployment=_deployment_budget(settings),
        nodes=settings.gateway_nodes,
        on_redis_down=settings.gateway_on_redis_down,
        on_local=lambda mode: metrics.fail_mode.labels("budget", mode).inc(),
    )
    app[keys.SHIPPER] = shipper = Shipper(
        pool,
        journal,
        keep_months=settings.gateway_keep_months,
        on_rows=lambda result, count: metrics.usage_rows.labels(result).inc(count),
        on_error=lambda kind: metrics.dependency_errors.labels("postgres", kind).inc(),
        on_adopted=lambda row: budgets.settle(row.request_id, row.total_tokens, row.cost_micros or 0),
        priced=recorder.priced,
        copy=copy,
        key=await patiently(lambda: load_audit_key(pool, settings.gateway_audit_key)),
    )
    metrics.usage_queue.follow(lambda: shipper.queued)
    metrics.usage_lag_seconds.follow(lambda: shipper.lag_seconds)
    metrics.journal_bytes.follow(lambda: journal.bytes)
    metrics.journal_dropped.follow(lambda: journal.dropped)


def _deployment_budget(settings: Settings) -> Budget:
    return Budget(
        settings.gateway_global_tokens_per_minute,
        settings.gateway_global_tokens_per_day,
        round(settings.gateway_global_cost_per_day * MICROS),
        round(settings.gateway_global_cost_per_month * MICROS),
    )


def _copy(app: web.Application, redis: Redis, journal: Journal) -> UsageCopy | None:
    metrics = app[keys.METRICS]
    if app[keys.SETTINGS].gateway_usage_copy == "none":
        return None
    copy = UsageCopy(
        redis,
        journal.folder.name,
        deployment=journal.root.name,
        on_error=lambda kind: metrics.dependency_errors.labels("redis", kind).inc(),
        gone=lambda: app[keys.SCRIPT].gone,
    )
    metrics.copy_behind.follow(lambda: copy.behind)
    return copy


def _providers(settings: Settings, routes: Routes) -> Context:
    async def context(app: web.Application) -> AsyncIterator[None]:
        async with AsyncExitStack() as opened:
            known = routes
            if wants_mock(settings):
                from gateway.mock import Mock  # not in production: it takes a fiftieth of a second and a megabyte

                mock = Mock()
                opened.push_async_callback(mock.stop)
                known = with_mock(routes, await mock.start())
            app[keys.UPSTREAM] = upstream = Upstream(settings)
            opened.push_async_callback(upstream.close)
            app[keys.BALANCER] = balancer = Balancer(tell=app[keys.OUTAGES].tell)
            balancer.follow(known.providers)
            learn = app[keys.METRICS].known_models.update
            app[keys.CATALOGUE] = Catalogue(known, upstream, app[keys.PRICES], on_models=learn, on_look=balancer.looked)
            show_health(balancer, app[keys.METRICS], known.answering())
            yield

    return context


async def _settled(app: web.Application) -> AsyncIterator[None]:
    """After all that lives for ever is made, and before the tasks, which it would hold up by a tenth of a second."""
    _settle_memory()
    yield


def _settle_memory() -> None:
    """What start-up made lives for ever: leave it out of every collection, and collect rarely.

    With the default thresholds a burst of streams pays for full collections in the middle of its tokens. And glibc is
    told to give large blocks back: by itself it learns to keep Argon2's 19 MiB once for every thread (mallopt(3)).
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


async def _tasks(app: web.Application) -> AsyncIterator[None]:
    """The long-running tasks, and what each still has to write when we stop."""
    bugs = app[keys.METRICS].internal_errors.labels("task")
    settings, metrics = app[keys.SETTINGS], app[keys.METRICS]
    connections = app[keys.CONNECTIONS] = Connections(
        metrics, header_timeout=settings.gateway_header_timeout, write_timeout=settings.gateway_write_timeout
    )
    pulse = app[keys.PULSE] = Pulse(settings, connections, metrics)
    pressure = app[keys.PRESSURE] = Pressure(pulse, connections, metrics)
    app[keys.PARTS] = keys.Parts(app)
    app[SHARING] = Sharing()
    keeper = app[keys.KEEPER]
    shipper, script, copy = app[keys.SHIPPER], app[keys.SCRIPT], app[keys.COPY]
    await script.meet()
    work = {**_work(app), "pulse": pulse.run, "pressure": pressure.run}
    tasks = [asyncio.create_task(_forever(name, task, bugs.inc)) for name, task in work.items()]
    yield
    await app[SHARING].close()
    await app[keys.STREAMS].close(KEEP)
    await keeper.close(KEEP)
    await app[keys.RECORDER].close()
    left = await shipper.close(FLUSH)
    if left:
        log.warning("%d usage rows wait in the journal for the next start", left)
    if copy is not None:
        await copy.close()
    await app[keys.BUDGETS].close()
    await app[keys.LIMITER].close()
    await script.close()
    await _end(tasks)


Work = Callable[[], Coroutine[Any, Any, None]]


def _work(app: web.Application) -> dict[str, Work]:
    copy, cuts_revoked = app[keys.COPY], app[keys.SETTINGS].gateway_revoked_streams == "cut"
    revoked = partial(end_revoked, app[keys.KEYS], app[keys.PULSE])
    return {
        "usage shipper": app[keys.SHIPPER].run,
        "limits and budgets": app[keys.SCRIPT].run,
        "kept answers": app[keys.KEEPER].run,
        "claims": app[keys.KEEPER].renew,
        "old answers": app[keys.KEEPER].sweep,
        "resumable streams": app[keys.STREAMS].run,
        "key revocations": app[keys.KEYS].listen,
        "catalogue": app[keys.CATALOGUE].run,
        "breakers": partial(app[keys.BALANCER].run, app[keys.CATALOGUE].look_now),
        "outages here": app[keys.OUTAGES].send,
        "outages elsewhere": partial(app[keys.OUTAGES].listen, app[keys.BALANCER].hear),
        **({"usage copy": copy.run} if copy is not None else {}),
        **({"streams of revoked keys": revoked} if cuts_revoked else {}),
    }


async def _forever(name: str, work: Work, count: Callable[[], None]) -> None:
    """A background task that fails is a bug: it is said at once, and the task begun anew: it would be missed."""
    while True:
        try:
            return await work()
        except Exception:
            count()
            log.exception("background task failed: %s", name)
        await asyncio.sleep(BEGIN_ANEW)


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Returns when all of them have ended, however often that has to be said.

    A cancellation that comes in the moment in which asyncio.wait_for is done is lost, before Python 3.12; asyncpg and
    redis-py use it (https://github.com/python/cpython/issues/86296).
    """
    waiting = set(tasks)
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=CANCEL_AGAIN)

"""The configuration read again while the gateway serves: the whole of it, or nothing."""

import logging
from collections.abc import Iterable
from functools import partial

from aiohttp import web

from gateway.appkeys import BALANCER, CATALOGUE, ENVIRON, LIMITER, METRICS, PRICES, RATES, SETTINGS
from gateway.balancer import Balancer
from gateway.breaker import STATES
from gateway.config import Config, load_config, with_mock_of
from gateway.metrics import Metrics
from gateway.settings import SettingsError

log = logging.getLogger("gateway.reload")


def reload(app: web.Application) -> bool:
    """The operator's file, from the next request on; False when it is wrong, and all stays as it was.

    It is read and checked before any of it is used, in some milliseconds, and then everything changes in one turn of
    the loop: no request sees half of it. An exchange that is open keeps the targets that it began with.
    """
    metrics = app[METRICS]
    try:
        config = load_config(app[SETTINGS], app[ENVIRON])
    except SettingsError as error:
        metrics.config_reloads.labels("failed").inc()
        metrics.config_ok.set(0)
        log.error("the configuration is wrong, the one before it stays: %s", "; ".join(str(error).splitlines()))
        return False
    except Exception:  # a bug, but none that should end what is being served
        metrics.config_reloads.labels("failed").inc()
        metrics.config_ok.set(0)
        metrics.internal_errors.labels("task").inc()
        log.exception("the configuration cannot be read, the one before it stays")
        return False
    _use(app, config)
    metrics.config_reloads.labels("ok").inc()
    metrics.config_ok.set(1)
    log.info("the configuration was read again: %d providers answer", len(config.routes.answering()))
    return True


def _use(app: web.Application, config: Config) -> None:
    catalogue = app[CATALOGUE]
    catalogue.follow(with_mock_of(config.routes, catalogue.routes))
    app[BALANCER].follow(catalogue.routes.providers)
    app[METRICS].add_providers(catalogue.routes.answering())
    show_health(app[BALANCER], app[METRICS], catalogue.routes.answering())
    app[PRICES].follow(config.prices)
    rates = app[RATES]
    rates.clear()
    rates.update(config.rates)
    app[LIMITER].rates_changed()


def show_health(balancer: Balancer, metrics: Metrics, providers: Iterable[str]) -> None:
    """The gauges of these providers' health, from now on; once more is nothing."""
    for name in providers:
        metrics.provider_in_flight.labels(name).follow(partial(balancer.in_flight, name))
        for state in STATES:
            metrics.provider_state.labels(name, state).follow(partial(balancer.is_in, name, state))

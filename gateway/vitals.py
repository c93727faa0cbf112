"""What a process says of itself: its connections, memory, event loop, configuration and age."""

import os
import platform
import time
from pathlib import Path

from gateway import __version__, labels
from gateway.page import Page

_STATM = Path("/proc/self/statm")  # Linux only, as in Prometheus's own client libraries


class Vitals(Page):
    """A page with all of that on it."""

    def __init__(self) -> None:
        super().__init__()
        self._declare_connections()
        self._declare_config()
        self._declare_build()

    def _declare_connections(self) -> None:
        self.pool_connections = self._gauge(
            "gateway_pg_pool_connections", "Connections to Postgres that wait for a query or are at one.", ("state",)
        )
        for state in labels.POOL_STATES:
            self.pool_connections.labels(state)
        self.pool_size_max = self._gauge(
            "gateway_pg_pool_size_max", "Connections to Postgres that there may be, in the pools of all processes."
        ).labels()
        self.connections_open = self._gauge(
            "gateway_connections_open", "Connections of clients that are open, with a request on them or idle."
        ).labels()
        self.event_loop_lag_seconds = self._gauge(
            "gateway_event_loop_lag_seconds",
            "The longest that the event loop was held up in the last 15 to 30 seconds.",
            together=max,
        ).labels()

    def _declare_config(self) -> None:
        self.config_reloads = self._counter(
            "gateway_config_reloads_total",
            "Times that the configuration was read again, by whether it is used now or was wrong.",
            ("result",),
            labels.CONFIG_RELOADS,
        )
        self.config_ok = self._gauge(
            "gateway_config_ok", "0 while the configuration on disk is wrong and an older one is used.", together=min
        ).labels()
        self.config_ok.set(1)

    def _declare_build(self) -> None:
        started = time.monotonic()
        uptime = self._gauge("gateway_uptime_seconds", "Seconds since this process started to serve.", together=max)
        uptime.labels().follow(lambda: time.monotonic() - started)
        memory = self._gauge(
            "process_resident_memory_bytes", "Memory of this process that is in RAM, in bytes; on Linux alone."
        )
        if _STATM.exists():
            memory.labels().follow(resident_bytes)
        build = self._gauge(
            "gateway_build_info", "Always 1; the labels say what runs.", ("version", "python"), together=max
        )
        build.labels(__version__, platform.python_version()).set(1)


def resident_bytes() -> float:
    """Second field of /proc/self/statm, in pages (proc_pid_statm(5))."""
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")

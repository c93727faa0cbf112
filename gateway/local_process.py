"""A program in the background, which outlives the command that started it and is found again by the lock it holds.

Its pid file holds its number and port, and it inherits our lock on that file: locked means running, whatever ended it.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL = 0.05  # seconds


class LocalError(Exception):
    """What is wrong and what helps, for the person at the terminal."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Running:
    pid: int
    port: int


@dataclass(frozen=True, slots=True)
class Background:
    name: str
    pid_file: Path
    log: Path  # what it writes

    def running(self) -> Running | None:
        try:
            file = self.pid_file.open()
        except FileNotFoundError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, port = file.read().partition(" ")
                if not port:
                    raise LocalError(f"Another `make up` is starting {self.name} right now.") from None
                return Running(int(pid), int(port))
        return None

    def start(self, command: Sequence[str], environ: Mapping[str, str], port: int) -> None:
        """Returns at once. The folders of its files exist, and it does not run."""
        self.pid_file.unlink(missing_ok=True)  # nobody holds the old one
        lock = os.open(self.pid_file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self.log.open("ab") as log:
                process = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environ,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            os.write(lock, f"{process.pid} {port}".encode())
        finally:
            os.close(lock)

    def has_died(self) -> bool:
        return self.pid_file.exists() and self.running() is None

    def stop(self, running: Running, patience: float, slow: str) -> None:
        """Returns when it is gone; after `patience` seconds it is killed. `slow` is said when that takes a while."""
        os.kill(running.pid, signal.SIGTERM)
        started, told = time.monotonic(), False
        while self.running():
            waited = time.monotonic() - started
            if waited > patience:
                os.kill(running.pid, signal.SIGKILL)
            if waited > 2 and not told:
                say(slow)
                told = True
            time.sleep(POLL)
        self.pid_file.unlink()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(f"  {line}" for line in lines[-15:]) or "  (it is empty)"


def listen_error(host: str, port: int) -> OSError | None:
    """Why a program could not listen there; None: it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return error
    return None

"""The few milliseconds between us and an embedded server's program; run as a script, never imported by the gateway.

    embedded_child.py run IDENTITY PARENT SIGNAL [PROGRAM ARGUMENT…]
    embedded_child.py watch SIGNAL:PID…

`run` becomes who the server shall run as, ties its life to PARENT's and becomes PROGRAM. It is a process of its own
because code between fork and exec may deadlock in a program with threads. It imports next to nothing: 11 ms a start.

Postgres refuses to run as root. IDENTITY says what root does about it:
  self       nothing; we are not root, or the program does not mind
  namespace  a user namespace in which root's number is NOBODY: no other user, no change of any file's owner
  nobody     where namespaces are refused, as in most containers: uid NOBODY, which keeps the one capability that
             lets it walk through folders of root's
"""

import contextlib
import ctypes
import os
import signal
import sys

NOBODY = 65534  # called `nobody` by Debian, Alpine and Fedora; initdb wants its user to have a name

# linux/sched.h, linux/prctl.h and linux/capability.h
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1


def run(identity: str, parent: str, death_signal: str, *command: str) -> None:
    if identity == "namespace":
        _enter_namespace()
    elif identity == "nobody":
        _become_nobody()
    if int(death_signal):
        _die_with(int(parent), int(death_signal))
    if command:
        os.execv(command[0], command)  # noqa: S606 - a shell is what we do not want


def watch(*servers: str) -> None:
    """Waits until standard input ends, which is when the process that holds its other end is gone; then signals."""
    while os.read(0, 1):
        pass
    for server in servers:
        number, pid = server.split(":")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), int(number))


def _enter_namespace() -> None:
    """user_namespaces(7): one number may be mapped without privileges, once `setgroups` is given up."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib takes longer to import than all of this
            file.write(line)


def _become_nobody() -> None:
    if sys.platform == "linux":
        _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # we do not have it either: then the folders must be open to all
            _keep_walking()


def _keep_walking() -> None:
    """capabilities(7): an ambient capability passes through exec, and must be permitted and inheritable before."""
    mask = 1 << _CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable; low and high words
    _call("capset", header, sets)
    _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def _die_with(parent: int, death_signal: int) -> None:
    """The kernel sends the signal when the thread that started us ends. Comes last: a change of user clears it."""
    _call("prctl", _PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(*sys.argv[2:])
    else:
        watch(*sys.argv[2:])

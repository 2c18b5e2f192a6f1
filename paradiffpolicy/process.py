"""Starts Python processes that end with this one, for planners and for environments.

A child process is a fresh interpreter (a forked one would hold this one's locks and GPU) that runs one
function with a connection to this process.  It has a session of its own, so that the terminal's Ctrl-C is
for this process alone; and it ends when this process does, even by SIGKILL: its standard input is a pipe
that only this process holds open.  POSIX only.  Nothing here imports numpy or torch, which take seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import multiprocessing.spawn
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError

Connection = multiprocessing.connection.Connection

PATIENCE = 2.0
"""Seconds that a process has to finish its work before it is killed."""

ENDING = 30.0
"""Seconds that a process may take from closing its connection to its end."""

_main_module: dict[str, Any] = {}
"""In a child process: where its parent's script is, until that was imported."""
_importing_main = False


def pickled(value: object, what: str, remedy: str) -> bytes:
    """``value`` for another process.

    Raises:
        InputError: it can't be pickled; the message names ``what`` and the ``remedy``.
    """
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"{what} can't go to another process ({error}): {remedy}")


class ChildProcess:
    """A process that runs ``target(connection, pickle.loads(content), *files)``.

    Args:
        target: a function of a module.
        content: its argument, pickled.
        name: for error messages and threads.
        files: file descriptors that stay open there, under the same numbers.

    Attributes:
        connection: to the process.
        alive: whether it runs.
        pid: its id.

    Raises:
        InputError: this process is itself such a child, on its way up.
    """

    def __init__(
        self, target: Callable[..., object], content: bytes, *, name: str, files: Sequence[int] = ()
    ) -> None:
        if _importing_main:
            raise InputError("processes are started below `if __name__ == '__main__':` of a script")
        self.name, self.alive = name, True
        here, there = socket.socketpair()
        with there:  # closed here: so the process's end is felt on the connection
            self.connection = Connection(here.detach())
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", str(there.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=(there.fileno(), *files),
                # Modules are found there as they are here.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
                start_new_session=True,
            )
        self.pid = self.process.pid
        # A thread that sleeps until the process ends: asking whether it lives costs nothing.
        self._watcher = threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True)
        self._watcher.start()
        head = pickle.dumps((target, files, _own_main_module()))
        with contextlib.suppress(ConnectionError):  # it ended already, which the next call tells
            self.connection.send_bytes(head)
            self.connection.send_bytes(content)

    def _watch(self) -> None:
        self.process.wait()
        self.alive = False

    def await_ready(self, timeout: float, given_up: threading.Event | None = None) -> None:
        """Waits for the process's first message, and ends the process if none comes.

        Raises:
            InputError: it ended, the time is over, or ``given_up`` was set meanwhile.
        """
        process, deadline = f"the {self.name}'s process", time.monotonic() + timeout
        try:
            while not self.connection.poll(0.1):
                if given_up is not None and given_up.is_set():
                    raise InputError(f"{process} was stopped while it was starting")
                if time.monotonic() > deadline:
                    raise InputError(f"{process} wasn't ready within {timeout:g} s")
            try:
                self.connection.recv_bytes()
            except (EOFError, ConnectionError):
                raise InputError(f"{process} {self.ending()} before it was ready: its own message is above")
        except BaseException:
            self.end(patience=0.0)
            raise

    def ending(self) -> str:
        """How the process ended, as ``ended by SIGKILL``; waits for the end."""
        self._watcher.join(ENDING)
        code = self.process.returncode
        if code is None:
            return "closed its connection"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def join(self, timeout: float | None = None) -> None:
        """Waits for the process's end."""
        self._watcher.join(timeout)

    def end(self, patience: float = PATIENCE) -> None:
        """Closes the connection, which asks the process to end, and kills it after ``patience`` seconds."""
        self.connection.close()
        try:
            self._watcher.join(max(0.0, patience))
        finally:
            self.process.kill()
            self._watcher.join()
            assert self.process.stdin is not None
            self.process.stdin.close()


def wake(connection: Connection) -> None:
    """Wakes the other end's ``woken``, without waiting.  Both ends must be non-blocking."""
    with contextlib.suppress(BlockingIOError, ConnectionError):  # awake already, or dead
        os.write(connection.fileno(), b".")


def woken(connection: Connection, timeout: float | None) -> bool:
    """Waits for the other end's ``wake``; False: it didn't within ``timeout`` seconds, or it ended."""
    with contextlib.suppress(ConnectionError):
        return connection.poll(timeout) and bool(os.read(connection.fileno(), 4096))
    return False


class RemoteObject:
    """An object in a process of its own, whose methods are called one at a time.

    Args:
        make: makes it there; picklable.
        name: of the process.
        remedy: for the error when the process dies.

    Raises:
        InputError: from any method: something can't be pickled, or the process died.
    """

    def __init__(self, make: Callable[[], Any], *, name: str, remedy: str) -> None:
        self._remedy = remedy
        self._child = ChildProcess(_serve_object, pickled(make, name, remedy), name=name)
        self.pid = self._child.pid

    def ask(self, method: str, *arguments: Any) -> None:
        """Calls a method; ``answer`` gives the result."""
        content = pickled((method, arguments), f"a call of {self._child.name}", self._remedy)
        try:
            self._child.connection.send_bytes(content)
        except ConnectionError:
            raise self._death()

    def answer(self) -> Any:
        """Waits for the result of the last call.

        Raises:
            Exception: the one that was raised there, with a note of its traceback.
        """
        try:
            error, result = pickle.loads(self._child.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._death()
        if error is not None:
            raise error
        return result

    def _death(self) -> InputError:
        return InputError(f"the process {self._child.name} {self._child.ending()}: {self._remedy}")


def end_all(remotes: Sequence[RemoteObject]) -> None:
    """Ends the processes of several objects, within ``PATIENCE`` seconds; ``close`` is called on each object
    first, in its process."""
    for remote in remotes:
        remote._child.connection.close()
    deadline = time.monotonic() + PATIENCE
    for remote in remotes:
        remote._child.end(deadline - time.monotonic())


# ------------------------------------------------------------------------------- in the child process


def main() -> None:
    """Runs the target in a child process."""
    global _main_module
    parent = os.dup(0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):
        head, content = connection.recv_bytes(), connection.recv_bytes()
        target, files, _main_module = pickle.loads(head)
        target(connection, _unpickled(content), *files)


def _end_with(parent: int) -> None:
    """Ends this process when the parent's end of the pipe closes, whatever it is doing."""
    os.read(parent, 1)
    os._exit(1)


def _own_main_module() -> dict[str, Any]:
    """Data with which ``multiprocessing.spawn.prepare`` finds the classes of this process's script."""
    data = multiprocessing.spawn.get_preparation_data("")
    return {key: data[key] for key in ("init_main_from_name", "init_main_from_path") if key in data}


def _unpickled(content: bytes) -> Any:
    """An object from the parent process; imports the parent's script when it is of a class of that."""
    global _importing_main, _main_module
    if _main_module and b"__main__" in content:
        data, _main_module = _main_module, {}
        _importing_main = True
        try:
            multiprocessing.spawn.prepare(data)
        finally:
            _importing_main = False
    return pickle.loads(content)


def _serve_object(connection: Connection, make: Callable[[], Any]) -> None:
    """Calls methods as asked until the connection closes, then ``close``."""
    served = make()
    with contextlib.closing(served):
        while True:
            connection.send_bytes(_answer(served, connection.recv_bytes()))


def _answer(served: Any, order: bytes) -> bytes:
    """``(None, result)`` or ``(exception, None)``, pickled."""
    try:
        method, arguments = _unpickled(order)
        return pickle.dumps((None, getattr(served, method)(*arguments)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        error.add_note(f"In the process {os.getpid()}:\n{traceback.format_exc()}")
        return pickle.dumps((_sendable(error), None), pickle.HIGHEST_PROTOCOL)


def _sendable(error: Exception) -> Exception:
    """The exception, or one that says the same if pickling changes it."""
    with contextlib.suppress(Exception):
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    for note in error.__notes__:
        plain.add_note(note)
    return plain

"""Where episodes' environments live: in this process, or spread over several.

The unit of work is the actions of a whole plan.  ``execute`` takes them for every environment that still
runs, and gives back what was observed on the way::

    rollout --- actions [n, A] of every running episode ---> Workers
    rollout <-- a Stretch of each ------------------------- Workers

So one message goes to each process per plan, and one comes back.  gymnasium's ``AsyncVectorEnv`` has a
process per environment and a message per step: then every step waits for the slowest environment, and
pays a pipe's two ways, Ta times as often; environments that ended are stepped on; and a hundred episodes
are a hundred processes.

Nothing here imports torch, which would take a process longer than all the rest of its start.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, require_count

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]
Picture = Callable[[gymnasium.Env[Any, Any]], NDArray[np.uint8]]

PATIENCE = 2.0
"""Seconds that processes have for what they are at, and for closing their environments."""


@dataclass(frozen=True)
class Scene:
    """What episodes have in common; goes to other processes by pickle.

    Attributes:
        make_env: called once per episode, where its environment lives.
        max_steps: an episode's length in control steps, if nothing ends it before.
        keep_infos: give back what the environment's info held before every action.
        picture, n_pictured: give back pictures of the episodes below ``n_pictured``.
    """

    make_env: MakeEnv
    max_steps: int
    keep_infos: bool = False
    picture: Picture | None = None
    n_pictured: int = 0


@dataclass(frozen=True)
class Stretch:
    """What one environment did with the actions of one plan; k of them if it ended early.

    Attributes:
        observations: ``[k, O]``, each after an action.
        rewards: per action.
        terminated: the environment said so after the last of them.
        over: the episode is: terminated, truncated, or ``max_steps`` long.
        infos: per action, the info before it; empty unless asked for.
        frames: per action, the picture before it; empty unless asked for.
    """

    observations: NDArray[Any]
    rewards: list[float]
    terminated: bool
    over: bool
    infos: list[dict[str, Any]]
    frames: list[NDArray[np.uint8]]


class Workers(Protocol):
    """Holds the environments of the episodes that run; episodes are known by a number."""

    def begin(self, scene: Scene, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        """Makes and resets an environment per seed; those left from before are closed.

        Args:
            seeds: by episode.

        Returns:
            The first observation ``[O]`` of each.
        """

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        """Steps environments through their actions ``[n, A]``; closes those whose episode ends."""

    def close(self) -> None:
        """Closes every environment; ``begin`` may be called again."""


def make_workers(count: int) -> Workers:
    """``count`` processes; 1: none but this one."""
    require_count(workers=count)
    return InlineWorkers() if count == 1 else ProcessWorkers(count)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Running:
    """An episode's environment and how far it has come."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env, self.n_steps = env, 0
        self.info: dict[str, Any] = {}

    def reset(self, seed: int) -> NDArray[Any]:
        observation, self.info = self.env.reset(seed=seed)
        return np.array(observation)

    def stretch(self, actions: NDArray[Any], scene: Scene, pictured: bool) -> Stretch:
        """Executes ``[n, A]``.  All that is kept is a copy: an environment may use its arrays again."""
        observations, rewards, infos, frames = [], [], [], []
        terminated = truncated = False
        for action in actions[: scene.max_steps - self.n_steps]:
            if scene.picture is not None and pictured:
                frames.append(np.array(scene.picture(self.env)))
            if scene.keep_infos:
                infos.append(copy.deepcopy(self.info))
            observation, reward, terminated, truncated, self.info = self.env.step(action.copy())
            observations.append(np.array(observation))
            rewards.append(float(reward))
            self.n_steps += 1
            if terminated or truncated:
                break
        over = bool(terminated or truncated) or self.n_steps >= scene.max_steps
        return Stretch(np.stack(observations), rewards, bool(terminated), over, infos, frames)


class InlineWorkers:
    """Environments in this process, one after the other."""

    def __init__(self) -> None:
        self._running: dict[int, _Running] = {}
        self._scene: Scene | None = None

    def begin(self, scene: Scene, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        self.close()
        self._scene, observations = scene, {}
        for episode, seed in seeds.items():
            self._running[episode] = _Running(scene.make_env())
            observations[episode] = self._running[episode].reset(seed)
        return observations

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        scene, stretches = self._scene, {}
        assert scene is not None
        for episode, rows in actions.items():
            stretch = self._running[episode].stretch(rows, scene, episode < scene.n_pictured)
            if stretch.over:  # at once: an environment may hold much memory
                self._running.pop(episode).env.close()
            stretches[episode] = stretch
        return stretches

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].env.close()


class ProcessWorkers:
    """Environments in other processes, which make, reset and step them at the same time while this one
    waits.  What they give is what ``InlineWorkers`` give, to the bit.

    Processes are started when ``begin`` first needs them and stay until ``close``.  An exception in one
    of them is raised here; after any exception all are gone, and the next ``begin`` starts new ones.
    They end when this process does, however it ends.

    Args:
        count: how many at most; an episode needs no more than one.

    Raises:
        InputError: from ``begin``, what the scene holds can't be sent to another process; from either
            call, a process died.
    """

    def __init__(self, count: int) -> None:
        require_count(workers=count)
        self._count = count
        self._children: list[_Child] = []
        self._homes: dict[int, _Child] = {}

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def begin(self, scene: Scene, seeds: Mapping[int, int]) -> dict[int, NDArray[Any]]:
        try:
            content = pickle.dumps(scene)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"this environment can't be made in another process ({error}): make_env and picture must be "
                "functions of a module, or functools.partial of one; or workers=1"
            )
        with _ctrl_c_kept_here():
            while len(self._children) < min(self._count, len(seeds)):
                self._children.append(_Child(len(self._children) + 1))
        # By turns: who ends early is spread over all, and so is who is pictured.
        self._homes = {
            episode: self._children[turn % len(self._children)] for turn, episode in enumerate(seeds)
        }
        return self._ask("begin", seeds, content)

    def execute(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, Stretch]:
        return self._ask("execute", actions)

    def _ask(self, what: str, parts: Mapping[int, Any], *common: bytes) -> dict[int, Any]:
        """Every process does its part; their answers together."""
        orders: dict[_Child, dict[int, Any]] = {child: {} for child in self._children}
        for episode, part in parts.items():
            orders[self._homes[episode]][episode] = part
        answers: dict[int, Any] = {}
        try:
            asked = [child for child, order in orders.items() if order or what == "begin"]
            for child in asked:
                child.send((what, *common, orders[child]))
            for child in asked:
                answers |= child.receive()
        except BaseException:
            self.close()  # some still owe an answer, which nobody would expect later
            raise
        return answers

    def close(self) -> None:
        children, self._children = self._children, []
        for child in children:
            child.dismiss()
        until = time.monotonic() + PATIENCE
        for child in children:
            child.join(until - time.monotonic())


class _Child:
    """A process and its pipe."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # forked ones would hold this one's locks and GPU
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=serve, args=(there,), name=f"environments-{number}", daemon=True
        )
        with there:  # closed here: so its end is felt on the pipe
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, order: Any) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(order, pickle.HIGHEST_PROTOCOL))
        except ConnectionError:
            raise self._death()

    def receive(self) -> Any:
        """Its answer.

        Raises:
            InputError: it died.
            Exception: what was raised there.
        """
        try:
            error, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._death()
        if error is not None:
            raise error
        return answer

    def _death(self) -> InputError:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        mend = "fewer workers or fewer episodes side by side need less memory"
        return InputError(f"the process {self._process.name} ended {how}: {mend}; workers=1 needs no process")

    def dismiss(self) -> None:
        self._connection.close()

    def join(self, patience: float) -> None:
        """Waits until it has ended, and sees to it that it does."""
        try:
            self._process.join(max(0.0, patience))
        finally:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _ctrl_c_kept_here() -> Iterator[None]:
    """The terminal's Ctrl-C is not for processes that start meanwhile: this one ends them."""
    resource_tracker.ensure_running()  # the first start would do it, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------- in the other process


def serve(connection: Connection) -> None:
    """Does what is asked until the pipe closes."""
    from .. import envs  # noqa: F401  registers the environments

    end_with_parent()
    here = InlineWorkers()
    with contextlib.closing(here), contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send_bytes(_answer(here, connection.recv_bytes()))


def end_with_parent() -> None:
    """This process won't outlive the one that started it, whatever it is at: whoever killed that didn't
    mean to wait."""
    threading.Thread(target=_wait_for_parents_end, daemon=True).start()


def _wait_for_parents_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(here: InlineWorkers, order: bytes) -> bytes:
    """``(None, result)`` or ``(exception, None)``, pickled."""
    try:
        what, *content = pickle.loads(order)
        if what == "begin":
            scene, seeds = content
            result: Any = here.begin(pickle.loads(scene), seeds)
        else:
            result = here.execute(*content)
        return pickle.dumps((None, result), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        error.add_note(f"In the environments' process:\n{traceback.format_exc()}")
        return pickle.dumps((_sendable(error), None), pickle.HIGHEST_PROTOCOL)


def _sendable(error: Exception) -> Exception:
    """The exception, or one that says the same if pickling changes it."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:
        pass
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    for note in error.__notes__:
        plain.add_note(note)
    return plain

"""LeRobot's async-inference server with a policy of this package: their ``robot_client`` plans on it.

    pip install 'lerobot[async]==0.4.4' paradiffpolicy      # in an environment of its own
    python examples/lerobot_server.py --checkpoint PATH --port 8080
    python -m lerobot.async_inference.robot_client --server_address=127.0.0.1:8080 --policy_type=diffusion \
        --pretrained_name_or_path=the-servers-own --actions_per_chunk=8 --robot.type=so101_follower ...

Their protocol sends pickles, which can run any program where they are read.  Here they are read by an
unpickler that makes numbers, text, containers and inert records of the few classes that a client sends, and
nothing else; a message is at most 64 KiB.  Nothing is authenticated: listen on 127.0.0.1, or use
``paradiffpolicy serve``, which has keys and TLS.  The policy is the one that the server was started with,
whatever the client names.  Pictures are refused: these policies observe numbers.

Tried with the client's own class of LeRobot 0.4.4 on one machine, and a simulated robot.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import struct
import threading
from concurrent import futures
from typing import Any

import numpy as np
import torch

import paradiffpolicy as pdp
from paradiffpolicy.history import History

LARGEST = 2**16
"""Bytes of a message."""

OPCODES = """
PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND
APPENDS EMPTY_DICT SETITEM SETITEMS STACK_GLOBAL NEWOBJ REDUCE BUILD
"""
"""What a client's messages are made of: none of them allocates more than there is in the message."""


class Record:
    """An inert stand-in for an object of a client: its attributes alone."""


class Dtype:
    """A stand-in for numpy's dtype, of which only little-endian numbers are read."""

    def __init__(self, code: str = "", *unused: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or state[1:2] not in (("<",), ("|",)):
            raise pickle.UnpicklingError("a number that isn't little-endian")


def scalar(dtype: object, data: object) -> float:
    """A numpy scalar as a number."""
    forms = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}
    code = dtype.code if isinstance(dtype, Dtype) else None
    if code not in forms or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a scalar of an unknown type")
    return float(struct.unpack(forms[code], data)[0])


HELPERS = "lerobot.async_inference.helpers"
KNOWN: dict[tuple[str, str], Any] = {
    (HELPERS, "TimedObservation"): Record,
    (HELPERS, "RemotePolicyConfig"): Record,
    ("numpy", "dtype"): Dtype,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "scalar"): scalar,
}
"""All that a message may name."""


class Reader(pickle.Unpickler):
    """Reads a client's messages: no other class, function or module than ``KNOWN`` is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return KNOWN[module, name]


def read(data: bytes, *attributes: str) -> list[Any]:
    """The attributes of the one record in a message.

    Raises:
        InputError: it is another thing, or too large.
    """
    try:
        if len(data) > LARGEST:
            raise pickle.UnpicklingError(f"{len(data)} bytes are more than {LARGEST}")
        if other := {code.name for code, _, _ in pickletools.genops(data)} - {*OPCODES.split()}:
            raise pickle.UnpicklingError(f"it holds the opcodes {', '.join(sorted(other))}")
        record = Reader(io.BytesIO(data)).load()
        if type(record) is not Record:
            raise pickle.UnpicklingError(f"it holds a {type(record).__name__}")
        return [vars(record)[name] for name in attributes]
    except Exception as error:  # whatever a hostile stream does
        raise pdp.InputError(f"a message can't be read: {type(error).__name__}: {error}")


class Planning:
    """A client's observations to a policy's plans, without gRPC.

    Args:
        policy: that plans.
        seed: of the noise.
    """

    def __init__(self, policy: Any, seed: int = 0) -> None:
        self.policy, self._seed = policy, seed
        self.reset()

    def reset(self) -> None:
        """Forgets a client."""
        self._names: list[str] = []
        self._n_actions = self.policy.spec.n_action_steps
        self._history = History(self.policy.spec.n_obs_steps)
        self._generator = torch.Generator().manual_seed(self._seed)
        self._last: tuple[Any, int] | None = None
        self._newest: tuple[int, float] | None = None  # step and time of an observation without a plan
        self._step = -1

    def set_up(self, data: bytes) -> None:
        """Takes the client's instructions.

        Raises:
            InputError: the policy doesn't observe what the client gives.
        """
        features, n_actions = read(data, "lerobot_features", "actions_per_chunk")
        spec, others = self.policy.spec, []
        try:
            names = [str(name) for name in features["observation.state"]["names"]]
            others, n_actions = [str(key) for key in features if key != "observation.state"], int(n_actions)
        except (KeyError, TypeError, ValueError) as error:
            raise pdp.InputError(f"the instructions can't be read: {type(error).__name__}: {error}")
        if others or len(names) != spec.obs_dim:
            given = ", ".join([f"{len(names)} numbers", *others])
            raise pdp.InputError(f"the client observes {given}; the policy observes {spec.obs_dim} numbers")
        if not 1 <= n_actions <= spec.n_action_steps:
            raise pdp.InputError(f"actions_per_chunk={n_actions} must be from 1 to {spec.n_action_steps}")
        self._names, self._n_actions = names, n_actions

    def observe(self, data: bytes) -> None:
        """Takes an observation; one that is older than the newest is left out.

        Raises:
            InputError: it lacks a number, isn't finite, or came before the instructions.
        """
        timestep, timestamp, values = read(data, "timestep", "timestamp", "observation")
        try:
            vector = np.array([float(values[name]) for name in self._names])
            step, time = int(timestep), float(timestamp)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise pdp.InputError(f"an observation can't be read: {type(error).__name__}: {error}")
        if not self._names:
            raise pdp.InputError("an observation came before the instructions")
        if not np.isfinite([*vector, time]).all() or not 0 <= step < 2**53:
            raise pdp.InputError(f"the observation of step {step} isn't finite, or of no step that can be")
        if step >= self._step:
            self._history.push(vector, step)
            self._step, self._newest = step, (step, time)

    def plan(self) -> tuple[int, float, torch.Tensor] | None:
        """The newest observation's step and time, and the actions ``[n, A]`` from it on; None: there is no
        new one."""
        if self._newest is None:
            return None
        (step, time), self._newest = self._newest, None
        previous, moved = (None, 0) if self._last is None else (self._last[0], step - self._last[1])
        spec = self.policy.spec
        if moved >= spec.horizon:
            previous, moved = None, 0
        plan = self.policy.plan(
            self._history.window(), previous, generator=self._generator, executed_steps=moved
        )
        self._last = plan, step
        return step, time, plan.actions[0, spec.executed][: self._n_actions].float().cpu()


def serve(planning: Planning, address: str) -> Any:
    """A gRPC server of their ``AsyncInference`` service, started.

    Returns:
        The server, and the port.
    """
    import grpc
    from lerobot.async_inference.helpers import TimedAction
    from lerobot.transport import services_pb2, services_pb2_grpc

    changed = threading.Condition()

    class Server(services_pb2_grpc.AsyncInferenceServicer):
        def _do(self, context: Any, action: Any, *arguments: Any) -> Any:
            try:
                with changed:
                    action(*arguments)
                    changed.notify_all()
            except pdp.InputError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return services_pb2.Empty()

        def Ready(self, request: Any, context: Any) -> Any:  # noqa: N802
            return self._do(context, planning.reset)

        def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
            return self._do(context, planning.set_up, request.data)

        def SendObservations(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
            data = b""
            for part in request_iterator:
                data += part.data
                if len(data) > LARGEST:
                    break
            return self._do(context, planning.observe, data)

        def GetActions(self, request: Any, context: Any) -> Any:  # noqa: N802
            with changed:
                plan = planning.plan() or (changed.wait(timeout=1.0) and planning.plan())
            if not plan:
                return services_pb2.Actions(data=b"")
            step, time, actions = plan
            period = 1 / planning.policy.spec.control_hz
            chunk = [TimedAction(time + k * period, step + k, action) for k, action in enumerate(actions)]
            return services_pb2.Actions(data=pickle.dumps(chunk))

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(Server(), server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--sampler", default="rti")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args()
    policy = pdp.load_policy(given.checkpoint, sampler=given.sampler)
    server, port = serve(Planning(policy), f"{given.host}:{given.port}")
    print(f"{policy.spec.task}, {given.sampler}, at {given.host}:{port}")
    server.wait_for_termination()


if __name__ == "__main__":
    main()

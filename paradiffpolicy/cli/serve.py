"""The policy server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..provenance import in_words, programs
from .building import load_policy, require_extra, sampling_policy

if TYPE_CHECKING:
    from .schema import ServeConfig


def serve(cfg: ServeConfig) -> None:
    """A policy for clients over the network, until SIGINT or SIGTERM."""
    import asyncio
    import gc

    from tqdm import tqdm

    from ..clock import MonotonicClock
    from ..control.scheduling import Scheduling, scheduled

    require_extra("serve")
    from ..serving.server import PolicyServer
    from ..serving.settings import ServerSettings

    key = os.environ.get("PARADIFFPOLICY_API_KEY") if cfg.api_key is None else cfg.api_key
    names = ["host", "port", "max_batch", "max_queue", "max_message", "max_sessions", "send_timeout", "seed"]
    settings = ServerSettings(
        api_key=key,
        certificate=None if cfg.certificate is None else Path(cfg.certificate),
        private_key=None if cfg.private_key is None else Path(cfg.private_key),
        **{name: getattr(cfg, name) for name in names},
    )
    settings.tls()  # says what is wrong with it before anything takes time
    policy = sampling_policy(cfg, cfg.sampler_name, load_policy(cfg))

    async def until_told() -> None:
        told, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.set)
        server = PolicyServer(policy, cfg.sampler_name, settings, MonotonicClock())
        try:
            sizes = server.warm_up_sizes
            with tqdm(total=sizes, unit="batch size", desc="warming up", dynamic_ncols=True) as bar:
                await server.warm_up(bar.update)
            gc.collect()
            gc.freeze()  # what is there now stays: looking through it takes tenths of a second
            await server.start()
            how = in_words(programs({cfg.sampler_name: policy}))
            print(f"{cfg.task.name}, {cfg.sampler_name}, {how}; listening on {server.uri}", flush=True)
            await told.wait()
        finally:
            await server.stop()

    with scheduled(Scheduling(awake=cfg.awake)) as refused:
        for line in refused:
            print(line, file=sys.stderr)
        asyncio.run(until_told())

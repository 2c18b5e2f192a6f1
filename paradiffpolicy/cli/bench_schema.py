"""The benchmarks' settings: a dataclass each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..presets import recipes
from .parts import (
    BACKENDS,
    PLANNERS,
    PRECISIONS,
    CommandConfig,
    DeviceConfig,
    PolicyConfig,
    SchedulingConfig,
    blending_setting,
    interpolation_setting,
    json_setting,
    replan_setting,
    sampler_names,
    sampler_setting,
    seed_setting,
)
from .settings import among, lazily, out_setting, path_setting, setting

SOLVERS = lazily("sampling.solvers", "SOLVERS")
SPACINGS = lazily("sampling.spacing", "SPACINGS")


@dataclass
class BenchLatencyConfig(PolicyConfig):
    """Times plans and network calls, eager and captured, interleaved in one run, as ratios to the loops
    that diffusion_policy and LeRobot run (diffusers). Prints tables, then one JSON line.

    Examples:
      paradiffpolicy bench latency
          the latency of every sampler
      paradiffpolicy bench latency 'samplers=[paraddpm]' sampler.paraddpm.window=20
          one, changed
      paradiffpolicy bench latency threads=1 out=latency.json
          one thread, kept in a file
    """

    samplers: list[str] = setting(
        [
            "ddpm",
            "dpm_solver_pp_6",
            "paraddpm",
            "speculative",
            "speculative_sde",
            "rti",
            "rti_5",
            "renoised",
            "student",
            "student_warm",
        ],
        "samplers to time",
        choices=sampler_names,
        some=True,
    )
    rewards: str | None = path_setting(
        None, "report.json of an evaluation of this checkpoint: its verdicts are shown and kept, too"
    )
    captures: list[str] = setting(
        ["eager", "auto"], "backends, for every sampler", choices=BACKENDS, some=True
    )
    networks: dict[str, list[int] | None] = setting(
        {"shipped": None, "large": [256, 512, 1024]},
        "channels of the levels, with random weights; null: the checkpoint's own",
        minimum=1,
        maximum=1e5,
        some=True,
    )
    repeats: int | dict[str, int] = setting(
        {"shipped": 20, "large": 5}, "plans per row; or one number for all", minimum=1
    )
    call_rows: list[int] = setting([1, 10], "rows of a timed network call; []: none", minimum=1)
    call_repeats: int = setting(30, "network calls per row", minimum=1)
    precisions: list[str] = setting(
        ["f32", "int8"], "arithmetic of captured network calls", choices=PRECISIONS, some=True
    )
    steady: int | dict[str, int] = setting(
        {"shipped": 0, "large": 0}, "plans in a row with 'rti', captured, for memory and p99", minimum=0
    )
    first_seed: int = seed_setting("seed of the episode whose observations are planned from")
    out: str | None = json_setting()


@dataclass
class BenchControlConfig(PolicyConfig):
    """Runs a control loop beside planners in another process, in a thread and inline, taking turns.
    Reports deadline errors, missed ticks and what a tick costs. Prints a table, then one JSON line.

    Examples:
      paradiffpolicy bench control
          100 Hz for 60 s beside each, plans back to back
      paradiffpolicy bench control 'planners=[process]' rate_hz=500 seconds=20
          one, faster
      paradiffpolicy bench control scheduling.priority=null scheduling.awake=false
          without privileges
    """

    sampler_name: str = sampler_setting()
    planners: list[str] = setting(
        ["process", "thread", "inline"], "planners to run beside", choices=PLANNERS, some=True
    )
    rate_hz: float = setting(100, "rate of the loop, the policy's or higher", above=0)
    seconds: float = setting(60, "seconds beside each planner, in all", above=0)
    turns: int = setting(3, "runs that they take turns in", minimum=1)
    blending: dict[str, Any] = blending_setting()
    interpolation: dict[str, Any] = interpolation_setting()
    replan_every: int = replan_setting(0)
    first_seed: int = seed_setting("seed of the episode whose observations are replayed")
    scheduling: SchedulingConfig = setting(
        lambda: SchedulingConfig(50, None, True, True, True), "of the loop's thread"
    )
    out: str | None = json_setting()


@dataclass
class BenchSoakConfig(PolicyConfig):
    """Runs a control loop for long beside a planner that is never idle, is killed and stopped, with
    observations that are dropped or have NaN in them, all at random. Says whether the loop missed more
    than the clock alone, whether its memory grew, whether every fault is recorded.

    Examples:
      paradiffpolicy bench soak
          an hour at 100 Hz, the planner killed and stopped 200 times
      paradiffpolicy bench soak seconds=60 kills=2 stops=1
          a minute
      paradiffpolicy bench soak rate_hz=50 out=soak.json
          slower, kept in a file
    """

    sampler_name: str = sampler_setting()
    rate_hz: float = setting(100, "rate of the loop, the policy's or higher", above=0)
    seconds: float = setting(3600, "length of the run", minimum=1)
    kills: int = setting(100, "SIGKILLs to the planner", minimum=0)
    stops: int = setting(100, "SIGSTOPs to the planner", minimum=0)
    planner_timeout: float = setting(1.0, "seconds after which a stopped planner counts as hung", above=0)
    dropped: float = setting(0.02, "share of observations that are dropped", minimum=0, maximum=0.5)
    not_finite: float = setting(0.02, "share of observations with NaN", minimum=0, maximum=0.5)
    seed: int = setting(0, "of what happens, and of the plans' noise", minimum=0, maximum=2**32 - 1)
    first_seed: int = seed_setting("seed of the episode whose observations are replayed")
    scheduling: SchedulingConfig = setting(
        lambda: SchedulingConfig(50, None, True, True, True), "of the loop's thread"
    )
    out: str | None = json_setting()


@dataclass
class BenchSolversConfig(PolicyConfig):
    """Compares solvers, numbers of steps and drivers: iterations, NFE, wall time, error to the sequential
    sample, error to the exact flow. Writes a table, JSON and a work-precision plot.

    Examples:
      paradiffpolicy bench solvers
          all of them, a few minutes
      paradiffpolicy bench solvers 'solvers=[ddpm]' 'steps=[100]'
          one solver, every driver
      paradiffpolicy bench solvers spacing=karras lambda_min=null
          on another grid
    """

    capture: str = setting("eager", "backend, of a hundred samplers for a few plans each", choices=BACKENDS)
    solvers: list[str] = setting(
        [
            *(
                "ddpm",
                "sde_dpm_solver_pp_2m",
                "ddim",
                "dpm_solver_pp_2m",
                "dpm_solver_pp_3m",
                "unipc",
                "plms",
            ),
            *("dpm_solver_2", "dpm_solver_3", "dpm_solver_pp_2s", "heun", "rk4"),
        ],
        "solvers to compare",
        choices=SOLVERS,
        some=True,
    )
    steps: list[int] = setting([5, 10, 20], "numbers of steps of every solver", minimum=1, some=True)
    spacing: str = setting("uniform_lambda", "spacing of timesteps", choices=SPACINGS)
    lambda_min: float | None = setting(
        -5.1, "lowest log-SNR; null: the schedule's (whose last timesteps are only noise)"
    )
    drivers: dict[str, dict[str, Any]] = setting(
        {
            "sequential": {"driver": "sequential"},
            "picard": {"driver": "picard", "tolerance": 0.002},
            "picard_published": {"driver": "picard_published", "tolerance": 0.1},
            "anderson": {"driver": "anderson", "tolerance": 0.002},
            "speculative": {"driver": "speculative"},
        },
        "drivers to compare; a window holds all nodes; speculative: for solvers with noise only",
        check=lazily("cli.building", "check_driver"),
        some=True,
    )
    first_seed: int = seed_setting("seed of the episode whose observations are planned from")
    windows: int = setting(4, "observations per row", minimum=1)
    out: str = out_setting("outputs/bench/solvers", "folder of solvers.json and solvers.png")


@dataclass
class BenchServeConfig(PolicyConfig):
    """Starts a server and times it: one client (round trip, planning, and what is between), then many at
    once (requests per second, batches, errors, memory), also beside hostile clients. Prints tables, then one
    JSON line.

    Examples:
      paradiffpolicy bench serve
          a thousand requests, then 16 clients for five minutes
      paradiffpolicy bench serve hostile=12 rate_hz=2 seconds=1800
          then beside others that send malformed messages, never read, ping, or leave things unfinished
      paradiffpolicy bench serve seconds=10 requests=100
          quickly
    """

    sampler_name: str = sampler_setting()
    max_batch: int = setting(8, "robots planned for at once", minimum=1)
    max_queue: int = setting(64, "requests that may wait", minimum=1)
    awake: bool = setting(True, "keeps idle cores awake: answers come sooner, for more power")
    requests: int = setting(1000, "requests of one client by itself", minimum=1)
    clients: int = setting(16, "clients side by side", minimum=1)
    hostile: int = setting(
        0, "hostile clients, beside which they are timed; a tenth as long without", minimum=0
    )
    seconds: float = setting(300, "seconds that they send requests for", above=0)
    rate_hz: float | None = setting(
        None, "requests per second and client; null: as fast as answers come", above=0
    )
    first_seed: int = seed_setting("seed of the episode whose observations are planned from")
    out: str | None = json_setting()


@dataclass
class BenchEnvsConfig(CommandConfig):
    """Times the environments' control steps and resets on one core, taking turns, and robosuite's own step
    beside ours. Prints a table, then one JSON line.

    Examples:
      paradiffpolicy bench envs
          all of them, some minutes
      paradiffpolicy bench envs 'envs=[paradiffpolicy/Lift-v0]'
          one
      paradiffpolicy bench envs own=false turns=20
          longer, without robosuite's own step
    """

    envs: list[str] = setting(
        [f"paradiffpolicy/{name}-v0" for name in ("PushT", "Lift", "Can", "Square", "Transport", "ToolHang")],
        "environments, by gymnasium's ids",
        some=True,
    )
    turns: int = setting(7, "turns of all, one after the other", minimum=1)
    steps: int = setting(100, "control steps per turn", minimum=1)
    own: bool = setting(True, "times robosuite's own step too")
    out: str | None = json_setting()


@dataclass
class BenchTrainConfig(DeviceConfig):
    """Times training steps beside diffusion_policy's (eager float32, AdamW, its average, diffusers' noise),
    and of a step with pictures, how much is reading them; taking turns. Prints tables, then one JSON line.

    Examples:
      paradiffpolicy bench train
          two networks, a minute
      paradiffpolicy bench train 'networks={}' '+networks.mine=[128,256]'
          another network
      paradiffpolicy bench train 'networks={}' picture_size=240
          reading larger pictures
    """

    networks: dict[str, list[int]] = setting(
        {"shipped": [64, 128, 256], "large": [256, 512, 1024]},
        "channels of the levels",
        minimum=1,
        maximum=1e5,
    )
    batch_sizes: dict[str, int] = setting({"shipped": 128, "large": 64}, "windows per step", minimum=1)
    precisions: list[str] = setting(
        ["float32", "bfloat16"], "arithmetic", choices=among("auto", "float32", "bfloat16"), some=True
    )
    recipe: str | None = setting(
        "pusht_pixels",
        "recipe of 'train' with pictures, of whose step the reading is timed; null: none",
        choices=lambda _: recipes(),
    )
    picture_size: int = setting(96, "pixels of its pictures, per side", minimum=1, maximum=4096)
    turns: int = setting(15, "timed steps of each kind", minimum=1)
    out: str | None = json_setting()

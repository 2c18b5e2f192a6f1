"""Every command's settings: a dataclass each, from which Hydra composes, and ``--help`` is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .bench_schema import (
    BenchControlConfig,
    BenchEnvsConfig,
    BenchLatencyConfig,
    BenchServeConfig,
    BenchSoakConfig,
    BenchSolversConfig,
    BenchTrainConfig,
)
from .data_schema import ConvertConfig, DownloadConfig
from .hub_schema import PullConfig, PushConfig
from .parts import (
    BACKENDS,
    BLENDING,
    PLANNERS,
    DeviceConfig,
    PolicyConfig,
    SafetyConfig,
    SamplersConfig,
    SchedulingConfig,
    TaskedConfig,
    blending_setting,
    disturbances_setting,
    executor_setting,
    forward_setting,
    interpolation_setting,
    replan_setting,
    sampler_names,
    sampler_setting,
    seed_setting,
    workers_setting,
)
from .settings import among, lazily, out_setting, path_setting, setting
from .study_schema import StudyConfig
from .train_schema import DistillConfig, TrainConfig


@dataclass
class CaseConfig:
    """What takes how long under mode=realtime."""

    sampler: str = sampler_setting("???")
    latency_ms: float | list[float] | None = setting(
        None, "a number, or a list to draw from; null: timed here", minimum=0, maximum=1e6, some=True
    )
    capture: str | None = setting(None, "backend that is timed", choices=BACKENDS)
    network: list[int] | None = setting(
        None, "channels of a network that is timed (random weights)", minimum=1, maximum=1e5, some=True
    )


def _case(sampler: str, **settings: Any) -> dict[str, Any]:
    return asdict(CaseConfig(sampler, **settings))


@dataclass
class SweepConfig:
    """Score against latency, at the first rate, a line per blending."""

    sampler: str = sampler_setting()
    latency_ms: list[float] = setting(
        [0, 12, 100, 200, 400, 600, 800, 1000, 1300], "latencies to inject", minimum=0, maximum=1e6
    )
    blendings: dict[str, dict[str, Any]] = setting(
        {name: {"name": name} for name in ("latest", "rtc", "temporal_ensemble")},
        "blendings by their names in the report",
        check=BLENDING,
        some=True,
    )


@dataclass
class RealtimeConfig:
    """For mode=realtime."""

    clock: str = setting(
        "virtual",
        "virtual: latencies as timed or given; wall: at the real rate",
        choices=among("virtual", "wall"),
    )
    side_by_side: int = setting(10, "wall: robots at a time, each with a loop and a planner", minimum=1)
    rates_hz: list[float] = setting("${task.rates_hz}", "control rates; []: the policy's", above=0)
    blending: dict[str, Any] = blending_setting()
    interpolation: dict[str, Any] = interpolation_setting()
    forward: dict[str, str] = forward_setting()
    replan_every: int | None = replan_setting()
    cases: dict[str, CaseConfig] = setting(
        {
            "ddpm_eager": _case("ddpm", capture="eager"),
            "ddpm": _case("ddpm"),
            "paraddpm": _case("paraddpm"),
            "rti": _case("rti"),
            "large_ddpm_eager": _case("ddpm", capture="eager", network=[256, 512, 1024]),
            "large_rti": _case("rti", network=[256, 512, 1024]),
        },
        "what takes how long: {sampler, latency_ms, capture, network} by name; latency_ms is given, "
        "the others say what is timed",
    )
    sweep: SweepConfig = setting(SweepConfig, "score against latency")


@dataclass
class EvaluateConfig(PolicyConfig):
    """Runs samplers of one policy in closed loop on the same seeds. Reports rewards with intervals,
    iterations per plan, plan latency and missed deadlines; writes report.json, a picture and videos.

    Examples:
      paradiffpolicy evaluate
          DDPM, ParaDDPM, speculative and rti on PushT, 50 seeds
      paradiffpolicy evaluate 'samplers=[ddim,rti]' seeds=10
          others, quickly
      paradiffpolicy evaluate mode=realtime
          what latency costs, in virtual time
    """

    samplers: list[str] = setting(
        ["ddpm", "paraddpm", "speculative", "rti"], "samplers to evaluate", choices=sampler_names, some=True
    )
    reference: str = setting(
        "ddpm", "sampler that the others are compared with, seed by seed", choices=sampler_names
    )
    seeds: int = setting(50, "episodes per sampler", minimum=1)
    first_seed: int = seed_setting("seed of the first episode")
    workers: int | str = workers_setting()
    executor: str = executor_setting()
    side_by_side: int | None = setting(
        25, "episodes at a time: a block, after which results are written; null: all", minimum=1
    )
    disturbances: dict[str, Any] = disturbances_setting()
    margin: float = setting(0.05, "difference of score that still counts as equivalent", above=0)
    success_margin: float = setting(
        0.1, "difference of the success rate that still counts as equivalent", above=0, maximum=1
    )
    stop_early: bool = setting(False, "ends a sampler after the block that decides on it; mode=unlimited")
    latency_plans: int = setting(20, "timed plans per sampler, for one robot; 0: none", minimum=0)
    paced_ticks: int = setting(40, "control ticks on the real clock; 0: none", minimum=0)
    videos: int = setting(4, "episodes per video; 0: none", minimum=0)
    video_size: int = setting(192, "pixels of an episode's picture", minimum=1, maximum=4096)
    mode: str = setting(
        "unlimited",
        "unlimited: the simulation waits for every plan; realtime: it doesn't",
        choices=among("unlimited", "realtime"),
    )
    realtime: RealtimeConfig = setting(RealtimeConfig, "for mode=realtime")
    out: str | None = out_setting(None, "folder of the report; null: outputs/evaluate/TASK/DATE-TIME")


@dataclass
class RunConfig(PolicyConfig):
    """Lets a policy drive a robot in real time (the task's environment by default) and reports the loop's
    timing. Shows it in the Rerun viewer; keeps it as a dataset, video, pictures. Ctrl-C or SIGTERM
    stops the robot and writes what there is.

    Examples:
      paradiffpolicy run
          PushT for 30 s, planning in a process of its own
      paradiffpolicy run view=rerun rate_hz=50 blending.name=rtc
          faster, smoother, watched
      paradiffpolicy run planner=inline video=inline.mp4 record=runs.zarr
          waiting for plans
    """

    sampler_name: str = sampler_setting()
    robot: str = setting(
        "env",
        "env: the task's environment, at the clock's pace; udp: in the network; or of a plugin",
        choices=lazily("robots", "ROBOTS"),
    )
    robot_address: str | None = setting(
        None,
        "HOST:PORT of a robot in the network, as of robot=udp",
        check=lazily("robots.udp", "host_and_port"),
    )
    robot_options: dict[str, Any] = setting({}, "options of a robot of your own")
    disturbances: dict[str, Any] = disturbances_setting()
    seconds: float = setting(30, "length of the run", above=0)
    rate_hz: float | None = setting(
        None, "rate of the loop, the policy's or higher; null: the policy's", above=0
    )
    planner: str = setting("process", "where plans are made; inline: the loop waits", choices=PLANNERS)
    blending: dict[str, Any] = blending_setting()
    interpolation: dict[str, Any] = interpolation_setting()
    forward: dict[str, str] = forward_setting()
    budget_ms: float | None = setting(
        None,
        "milliseconds per plan: by the first of 'anytime' that fits, or as many iterations as do",
        above=0,
    )
    anytime: list[str] = setting(
        ["paraddpm", "rti"],
        "samplers, the best first; the last is run iteration by iteration if none fits",
        choices=sampler_names,
        some=True,
    )
    replan_every: int | None = replan_setting()
    seed: int = seed_setting("seed of the environment and of the plans' noise")
    view: str | None = path_setting(
        None, "rerun: opens the viewer; PATH.rrd: saves; or rerun+http://HOST:PORT/proxy"
    )
    record: str | None = out_setting(
        None, "a .zarr store that the run is appended to, as train reads them", ".zarr"
    )
    video: str | None = out_setting(None, "writes a video, PATH.mp4", ".mp4", writes="file")
    picture_size: int = setting(
        256, "pixels of pictures in the view and in the video", minimum=1, maximum=4096
    )
    timeline: list[float] | None = setting(
        None, "[from, to] seconds that timeline.png shows; null: the first few plans", minimum=0
    )
    out: str | None = out_setting(None, "folder of the report; null: outputs/run/TASK/DATE-TIME")
    safety: SafetyConfig = setting(SafetyConfig, "what is acted on")
    scheduling: SchedulingConfig = setting(SchedulingConfig, "of the loop's thread")


@dataclass
class CollectConfig(PolicyConfig):
    """Rolls a policy out and appends the episodes to a dataset that 'train' reads. Stopping it at any
    moment loses nothing that was there before.

    Examples:
      paradiffpolicy collect
          50 PushT episodes to outputs/collect/pusht.zarr
      paradiffpolicy collect out=my.zarr episodes=200 min_score=0.9
          good ones only
      paradiffpolicy collect executor=ray workers=auto episodes=2000
          on all cores of a Ray cluster
    """

    sampler_name: str = sampler_setting()
    expert: str | None = setting(
        None,
        "scripted: the task's expert in place of the policy; its failures are left out",
        choices=among("scripted"),
    )
    out: str = out_setting("outputs/collect/${task.name}.zarr", "dataset that is made, or appended to")
    episodes: int = setting(50, "episodes to collect", minimum=1)
    first_seed: int | None = seed_setting(
        "seed of the first episode; null: goes on after the store's last episode", None
    )
    batch: int = setting(10, "a policy's episodes side by side: a block", minimum=1)
    workers: int | str = workers_setting()
    executor: str = executor_setting()
    min_score: float | None = setting(None, "episodes below it are not written; null: all are")


@dataclass
class ExportConfig(SamplersConfig, TaskedConfig):
    """Writes a policy's plans as files for other runtimes, in float32: an OpenVINO model and an ONNX model,
    observation window and noise in, actions out, and what they mean. docs/export.md has C++ and Python.

    Examples:
      paradiffpolicy export
          the shipped policy with rti, to outputs/export/pusht
      paradiffpolicy export task=lift sampler_name=renoised out=lift_plans
          another policy, another sampler
      paradiffpolicy export sampler_name=student batch=4 out=plans
          for four robots at a time, in one network call
    """

    out: str = out_setting("outputs/export/${task.name}", "folder to write; must not exist")
    sampler_name: str = sampler_setting()
    checkpoint: str | None = path_setting("${task.checkpoint}", "the policy's folder")
    batch: int = setting(1, "robots per plan", minimum=1, maximum=4096)
    torch_too: bool = setting(
        False, "whether plan.pt2, of torch.export, is written too; takes a second per iteration"
    )
    n_action_steps: int | None = setting(
        None, "steps of a plan that are executed (Ta); null: as it was trained", minimum=1
    )
    guidance_scale: float | None = setting(
        None, "classifier-free guidance, of policies trained with condition_dropout", minimum=0, maximum=1000
    )


@dataclass
class ServeConfig(PolicyConfig):
    """Serves a policy over websockets: openpi's clients, and paradiffpolicy's RemotePolicy, plan on it.
    GET /healthz answers while it runs, GET /metrics counts. SIGTERM ends it after pending answers.

    Examples:
      paradiffpolicy serve
          the shipped policy, on this machine only
      paradiffpolicy serve port=8001 sampler_name=speculative_sde
          another port, another sampler
      paradiffpolicy serve host=0.0.0.0 certificate=cert.pem private_key=key.pem
          to other machines, with TLS and the API key in PARADIFFPOLICY_API_KEY
    """

    sampler_name: str = sampler_setting()
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0: every interface (set an API key and TLS)"
    )
    port: int = setting(8000, "port; 0: any that is free", minimum=0, maximum=65535)
    api_key: str | None = setting(None, "key that clients must show; null: PARADIFFPOLICY_API_KEY, or none")
    certificate: str | None = path_setting(None, "PEM file for TLS; null: no TLS")
    private_key: str | None = path_setting(None, "PEM file for TLS")
    max_batch: int = setting(8, "robots planned for at once", minimum=1)
    max_queue: int = setting(64, "requests that may wait; more are answered 'busy'", minimum=1)
    awake: bool = setting(False, "keeps idle cores awake: answers come sooner, for more power")
    max_message: int = setting(2**20, "most bytes of a request", minimum=1)
    max_sessions: int = setting(64, "most connections", minimum=1)
    send_timeout: float = setting(
        5.0, "seconds for a request to arrive, or an answer to be sent, before a client is cut off", above=0
    )
    seed: int = setting(0, "seed of the sessions' noise", minimum=0, maximum=2**63 - 1)


@dataclass
class InfoConfig(DeviceConfig, TaskedConfig):
    """Describes datasets of any known format and checkpoints; without any, the machine, the task
    and its environment, the checkpoint and the dataset. Of datasets it says what is unusual, and draws them.

    Examples:
      paradiffpolicy info task=lift
          whether a task is complete: its environment, dataset, policy
      paradiffpolicy info demo.hdf5 outputs/collect/lift.zarr
          datasets
      paradiffpolicy info outputs/train/pusht/checkpoint
          a checkpoint
    """

    paths: list[str] = setting([], "datasets, checkpoints: these alone", path=True)
    checkpoint: str | None = path_setting("${task.checkpoint}", "a policy's folder")
    dataset: str | None = path_setting("${task.dataset}", "demonstrations")
    out: str | None = setting(
        "outputs/info", "folder for a picture of each dataset, NAME.png; null: none", path=True
    )


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "study": StudyConfig,
    "run": RunConfig,
    "collect": CollectConfig,
    "download": DownloadConfig,
    "convert": ConvertConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "info": InfoConfig,
    "bench latency": BenchLatencyConfig,
    "bench control": BenchControlConfig,
    "bench soak": BenchSoakConfig,
    "bench solvers": BenchSolversConfig,
    "bench serve": BenchServeConfig,
    "bench envs": BenchEnvsConfig,
    "bench train": BenchTrainConfig,
}
"""The dataclass of every command's settings."""

"""The parts of commands' settings: the task's file, and what several commands share.

A base class's docstring is the heading of its settings in ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LARGEST
from ..registry import Registry
from .settings import among, lazily, out_setting, path_setting, setting

AUGMENTATIONS = lazily("cli.environments", "AUGMENTATIONS")
WEIGHTS = lazily("cli.environments", "WEIGHTS")
TRIMS = lazily("cli.environments", "TRIMS")
BACKENDS = lazily("sampling.capture.backends", "BACKENDS")
PLANNERS = lazily("planning", "PLANNERS")
PRECISIONS = lazily("models.precision", "CHOICES")
DISTURBANCES = lazily("disturbances", "require_disturbances")
BLENDING = lazily("cli.building", "named_blending")
INTERPOLATION = lazily("cli.building", "named_interpolation")


def sampler_names(config: Any) -> Registry[Any]:
    """The samplers that a command's config names."""
    return Registry("sampler", {} if config is None else config.sampler)


def sampler_setting(default: str = "rti", text: str = "sampler that makes the plans") -> Any:
    """One of the samplers."""
    return setting(default, text, choices=sampler_names)


VALIDATION_SEED = 200_000
"""The first seed for choosing among checkpoints or settings: those of reports stay unseen."""


def seed_setting(text: str, default: int | None = 100_000) -> Any:
    """The first of some seeds, none of which is a demonstration's; simulators' end below 2^32."""
    return setting(default, text, minimum=0, maximum=4_000_000_000)


def workers_setting(default: int | str = "${task.workers}") -> Any:
    """How many processes environments live in."""
    text = "processes for environments; 1: none but this; auto: one per core"
    return setting(default, text, minimum=1, choices=among("auto"))


def executor_setting() -> Any:
    """Where blocks of episodes run."""
    text = "where blocks of episodes run; local: here; ray: on as many Ray workers as 'workers' says"
    return setting("local", text, choices=lazily("evaluation.executors", "EXECUTORS"))


def blending_setting() -> Any:
    """A blending and its options."""
    text = "how plans that overlap make one action; options as +blending.overlap=3"
    return setting({"name": "latest"}, text, named=True, check=BLENDING)


def interpolation_setting() -> Any:
    """An interpolation and its options."""
    text = (
        "command between a plan's steps, as hold, linear or cubic; auto: hold where rates divide, else "
        "linear as the contract says"
    )
    return setting({"name": "auto"}, text, named=True, check=INTERPOLATION)


def forward_setting() -> Any:
    """Which numbers of an observation are rolled forward."""
    text = (
        "observed numbers that the actions move, as {x: state.0}: rolled forward to when a plan will begin; "
        "{}: none"
    )
    return setting({}, text)


def disturbances_setting() -> Any:
    """The environment's disturbances and their strengths."""
    text = "disturbances of the environment and their strengths, as {action_noise: 0.02}"
    return setting({}, text, check=DISTURBANCES)


def replan_setting(default: int | None = None) -> Any:
    """How often plans are asked for."""
    null = "null: n_action_steps; " if default is None else ""
    return setting(default, f"steps from plan to plan; {null}0: back to back", minimum=0)


def json_setting() -> Any:
    """Where a benchmark's numbers go."""
    return out_setting(None, "a JSON file; null: only printed", writes="file")


# --------------------------------------------------------------------------------------------- tasks


@dataclass
class EnvConfig:
    """The simulated environment."""

    id: str | None = setting(None, "gymnasium's id, as my_module:Reach-v0 (a module of this folder)")
    kwargs: dict[str, Any] = setting({}, "what the environment is made with")
    renamed: dict[str, str] = setting(
        {}, "names of a dict of observations that the dataset has others for, as {agent_pos: state}"
    )


@dataclass
class FieldConfig:
    """One field of the observation vector."""

    key: str = setting("???", "name in the dataset")
    start: int | None = setting(None, "the first of its numbers that is observed")
    stop: int | None = setting(None, "the first after those that are observed")
    shape: list[int] | None = setting(None, "shape of the whole field", minimum=1)
    unit: str = setting("", "unit of its numbers, as m")


@dataclass
class CameraConfig:
    """A camera that is observed."""

    key: str = setting("???", "name in the dataset")
    shape: list[int] = setting("???", "[height, width, 3]: RGB bytes", minimum=1)


@dataclass
class ActionConfig:
    """What an action is."""

    kind: str = setting("other", "meaning of an action", choices=lazily("task", "ACTION_KINDS"))
    unit: str = setting("", "unit of an action's numbers, as m")
    names: list[str] = setting([], "names of an action's numbers")


@dataclass
class TaskConfig:
    """The task's file."""

    name: str = setting("???", "the task's name; the file's, unless it says another")
    variant_of: str | None = setting(
        None, "a task of the same observations and actions, whose policies drive this one too"
    )
    env: EnvConfig = setting(EnvConfig, "the environment")
    success_key: str | None = setting(
        None, "key of the environment's info, or terminated; null: success, is_success, or unknown"
    )
    scoring: str = setting(
        "max", "how an episode's score is made of its rewards", choices=lazily("environment", "SCORINGS")
    )
    reward_range: list[float] | None = setting(
        None,
        "[low, high] of all rewards, which a study of scores needs; null: unknown",
        minimum=-LARGEST,
    )
    max_steps: int = setting(300, "control steps per episode", minimum=1)
    control_hz: float | None = setting(None, "control steps per second; null: the environment's", above=0)
    rates_hz: list[float] = setting([], "control rates of evaluate mode=realtime; []: control_hz", above=0)
    observation: list[FieldConfig] = setting([], "fields of the dataset that make up the observation vector")
    cameras: list[CameraConfig] = setting([], "cameras whose pictures are observed beside the vector")
    action: ActionConfig = setting(ActionConfig, "what an action is")
    record: list[str] = setting([], "fields of the environment's info that collect and run store")
    expert: str | None = setting(
        None,
        "scripted demonstrator, for collect expert=scripted",
        choices=lazily("collection.experts", "EXPERTS"),
    )
    augmentation: str | None = setting(
        None, "how the dataset is augmented; null: not at all", choices=AUGMENTATIONS
    )
    weights: str | None = setting(
        None, "how much each demonstration counts in training; null: all alike", choices=WEIGHTS
    )
    weights_options: dict[str, Any] = setting({}, "options of the weights, as {threshold: 0.9}")
    trim: str | None = setting(None, "where demonstrations are cut; null: nowhere", choices=TRIMS)
    dataset: str | None = path_setting(None, "the demonstrations")
    checkpoint: str | None = path_setting(None, "the policy's folder")
    workers: int | str = workers_setting(1)


# ---------------------------------------------------------------------------------------------- parts


@dataclass
class NetworkConfig:
    """The policy that is trained."""

    network: str = setting("unet1d", "kind of network", choices=lazily("models.networks", "NETWORKS"))
    network_options: dict[str, Any] = setting({}, "options of the network, if it has any, as {n_layer: 6}")
    encoder: str = setting(
        "resnet18", "encoder of the cameras' pictures", choices=lazily("models.vision", "ENCODERS")
    )
    encoder_options: dict[str, Any] = setting({}, "options of the encoder, as {width: 32, crop: [84, 84]}")
    image_features: int = setting(64, "numbers that each camera's picture is encoded in", minimum=1)
    n_obs_steps: int = setting(2, "observations that a plan is made from (To)", minimum=1)
    horizon: int = setting(16, "steps of a plan (T)", minimum=1)
    n_action_steps: int = setting(8, "steps of a plan that are executed (Ta)", minimum=1)
    down_dims: list[int] = setting(
        [64, 128, 256], "channels of the U-Net's levels", minimum=1, maximum=100_000, some=True
    )
    diffusion_step_embed_dim: int = setting(256, "numbers that encode the timestep", minimum=1)
    kernel_size: int = setting(5, "width of the convolutions", minimum=1)
    n_groups: int = setting(8, "groups of group normalization", minimum=1)
    cond_predict_scale: bool = setting(True, "whether FiLM scales, or only shifts")
    schedule: str = setting(
        "squared_cosine", "noise schedule", choices=lazily("diffusion.schedule", "SCHEDULES")
    )
    schedule_options: dict[str, Any] = setting({}, "options of the noise schedule, as flow has them")
    n_train_steps: int = setting(100, "timesteps of the noise schedule", minimum=1)
    prediction: str = setting(
        "epsilon", "what the network predicts", choices=lazily("diffusion.denoiser", "PREDICTIONS")
    )
    clip: float | None = setting(1.0, "bound of normalized actions; null: none", above=0)
    relative: dict[str, str] = setting(
        {},
        "numbers of an action that are relative to observed ones, as {x: state.0}: field and place in it",
    )
    condition_dropout: float = setting(
        0.0, "share of windows trained without observation, for guidance", minimum=0, below=1
    )
    prefix_steps: int = setting(
        0, "longest delay, in steps, simulated in training, for blending.name=prefix; 0: none", minimum=0
    )


@dataclass
class TrainingConfig:
    """Optimization; counts are optimizer steps."""

    n_steps: int = setting(7000, "steps in all", minimum=1)
    batch_size: int = setting(128, "windows per step", minimum=1)
    learning_rate: float = setting(3e-4, "highest learning rate of AdamW", above=0, maximum=1000)
    warmup_steps: int = setting(500, "steps until the learning rate is at its highest", minimum=0)
    weight_decay: float = setting(1e-6, "weight decay of AdamW", minimum=0, maximum=1000)
    seed: int = setting(0, "seed of weights, noise and order", minimum=0, maximum=2**32 - 1)
    precision: str = setting(
        "auto",
        "arithmetic; auto: bfloat16 where the hardware multiplies it",
        choices=among("auto", "float32", "bfloat16"),
    )
    accumulate: int = setting(
        1, "pieces that a process computes its rows of a step's batch in, to save memory", minimum=1
    )
    log_every: int = setting(20, "steps between points of the curves", minimum=1)
    save_every: int = setting(250, "steps between saves, from which a stopped run resumes", minimum=1)
    evaluate_every: int = setting(0, "steps between evaluations; 0: only at the end", minimum=0)
    validate_every: int = setting(250, "steps between validations, if episodes are held out", minimum=1)


@dataclass
class SafetyConfig:
    """What the robot acts on; else the fallback acts, and stops it in the end."""

    limits: list[list[float]] | None = setting(
        None, "[low, high] of actions, a list of each; null: any that are finite"
    )
    fallback_timeout: float = setting(
        2, "seconds after which a fallback that goes on acting stops the robot", above=0
    )
    max_plan_age: float | None = setting(
        None, "seconds since its request that a plan is acted on; null: until it ends", above=0
    )
    max_observation_age: float | None = setting(
        None, "seconds that a plan is acted on without a good observation; null: Ta steps", above=0
    )
    frozen_after: float | None = setting(
        None, "seconds after which an observation that never changed isn't believed; null: it is", above=0
    )
    planner_timeout: float = setting(10, "seconds after which a planner that doesn't answer hangs", above=0)


@dataclass
class SchedulingConfig:
    """What the loop's thread asks of the operating system."""

    priority: int | None = setting(
        None, "real-time priority under SCHED_FIFO, 1 to 99; null: none", minimum=1, maximum=99
    )
    cores: list[int] | None = setting(
        None, "cores that it may run on, as [0]; null: any", minimum=0, some=True
    )
    lock_memory: bool = setting(False, "whether all memory stays in RAM")
    freeze_gc: bool = setting(True, "whether garbage collection pauses while it runs")
    awake: bool = setting(False, "whether idle cores stay awake")


# ------------------------------------------------------------------------------------ shared by commands


@dataclass
class CommandConfig:
    """Your own modules."""

    plugins: list[str] = setting(
        [], "modules to import first, as my_module: they register solvers, robots, experts, …"
    )


@dataclass
class TaskedConfig(CommandConfig):
    """The task: a name, or a file as task=./mine.yaml; its values as task.max_steps=16."""

    task: TaskConfig = setting(TaskConfig, "the task")


@dataclass
class DeviceConfig(CommandConfig):
    """Where to compute."""

    device: str = setting("auto", "auto: cuda if there is one, else cpu; or PyTorch's name of one")
    threads: int | None = setting(None, "CPU threads; null: PyTorch and OpenVINO decide", minimum=1)


@dataclass
class MachineConfig(DeviceConfig):
    """How plans are captured."""

    capture: str = setting(
        "auto", "backend; auto: cuda_graph on a GPU, openvino on a CPU; eager: no capture", choices=BACKENDS
    )
    precision: str = setting(
        "auto", "arithmetic of the network; auto: bf16 where the hardware multiplies it", choices=PRECISIONS
    )
    capture_cache: str | None = path_setting(
        "auto", "folder for compiled models; auto: ~/.cache/paradiffpolicy; null: none are kept"
    )
    pinning: bool | None = setting(None, "pins a captured call's threads to cores; null: OpenVINO decides")
    tf32: bool = setting(False, "computes float32 products in TF32 on a GPU")
    fuse: bool = setting(True, "fuses kernels on a GPU: tens of seconds at the first plan")


@dataclass
class SamplersConfig(CommandConfig):
    """Samplers: their options as sampler.paraddpm.window=50; a new one as '+sampler.mine={solver: ddim}'."""

    sampler: dict[str, dict[str, Any]] = setting(
        {}, "samplers by name", check=lazily("cli.building", "check_sampler")
    )


@dataclass
class PolicyConfig(SamplersConfig, MachineConfig, TaskedConfig):
    """The policy."""

    checkpoint: str | None = path_setting("${task.checkpoint}", "the policy's folder")
    n_action_steps: int | None = setting(
        None, "steps of a plan that are executed (Ta); null: as it was trained", minimum=1
    )
    guidance_scale: float | None = setting(
        None, "classifier-free guidance, of policies trained with condition_dropout", minimum=0, maximum=1000
    )
    dynamic_threshold: float | None = setting(
        None, "quantile that bounds guided plans instead of clipping, as 0.995", above=0, maximum=1
    )

"""Demonstrations to a checkpoint, and a checkpoint to its student."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..provenance import machine
from ..tables import bar
from .building import capture_settings, choose_device, named_sampler, task_checkpoint
from .environments import AUGMENTATIONS, TRIMS, WEIGHTS, contract, env_maker, env_workers
from .locating import locate, locate_checkpoint
from .processes import joined_processes

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..data.dataset import WindowDataset
    from ..data.replay_buffer import ReplayBuffer
    from ..task import Camera, ObservationField
    from ..training.train import Trainer
    from ..types import PolicySpec
    from .parts import TaskedConfig
    from .train_schema import DataConfig, DistillConfig, TrainConfig


def train(cfg: TrainConfig) -> None:
    """Demonstrations to a checkpoint; run again to resume."""
    from ..calibration import CURVES
    from ..data.splitting import held_out_episodes, split
    from ..interchange.reading import read_checkpoint
    from ..training.settings import TrainSettings
    from ..training.train import Trainer
    from ..training.validation import Validation

    device = choose_device(cfg)
    processes = joined_processes(device)
    settings = TrainSettings(**vars(cfg.training))
    data, about_data, spec = training_data(cfg)
    validate = None
    if cfg.validation:
        held_out = held_out_episodes(about_data["n_episodes"], cfg.validation, settings.seed)
        data, validation = split(data, held_out, twins=1 if cfg.augmentation is None else 2)
        about_data["held_out"], validate = held_out, Validation(validation, device)
    place = locate_checkpoint(cfg.init, "init") if cfg.init else None
    init = read_checkpoint(place) if place else None
    info = origin(cfg, about_data, place)
    evaluate = evaluation(cfg, spec, device) if cfg.evaluation.seeds and processes.main else None
    trainer = Trainer(
        data,
        spec,
        settings,
        Path(cfg.run),
        info=info,
        init=init,
        evaluate=evaluate,
        validate=validate,
        device=device,
        processes=processes,
    )
    checkpoint = trained(trainer)
    if processes.main:
        checkpoint.info[CURVES] = curves(cfg, checkpoint, data, device)
        publish(checkpoint, trainer, cfg.checkpoint)
    processes.wait()


def distill(cfg: DistillConfig) -> None:
    """A policy to a student of it; run again to resume."""
    import torch

    from ..interchange.reading import read_checkpoint, weights_sha256
    from ..policy import Policy
    from ..training.distillation import Distillation, student_spec, teacher_sampler
    from ..training.settings import TrainSettings
    from ..training.train import Trainer

    device = choose_device(cfg)
    processes = joined_processes(device)
    settings, folder = TrainSettings(**vars(cfg.training)), locate_checkpoint(cfg.checkpoint)
    teacher = task_checkpoint(cfg.checkpoint, cfg.task)
    if teacher.spec.first_executed is not None:
        raise InputError(
            f"checkpoint={folder} executes its plans from step {teacher.spec.first_executed} on, and "
            "demonstrations are cut for plans from the oldest observation on: it can't be a teacher"
        )
    if teacher.spec.student_timesteps:
        raise InputError(f"checkpoint={folder} is a student itself: name its teacher, as {folder.parent}")
    data, about_data, *_ = dataset_windows(cfg, vars(teacher.spec))
    spec = student_spec(teacher.spec, cfg.nodes)
    place = locate_checkpoint(cfg.init, "init") if cfg.init else None
    init = read_checkpoint(place) if place else replace(teacher, spec=spec, stored=torch.float16)
    info = origin(cfg, about_data, place or folder) | {"teacher": {"sha256": weights_sha256(folder)}}
    evaluate = evaluation(cfg, spec, device) if cfg.evaluation.seeds and processes.main else None
    plans = Policy.from_checkpoint(teacher, teacher_sampler(teacher.spec, cfg.nodes), device)
    trainer = Trainer(
        data,
        spec,
        settings,
        Path(cfg.run),
        info=info,
        init=init,
        objective=partial(Distillation, teacher=plans.captured(**capture_settings(cfg))),
        evaluate=evaluate,
        device=device,
        processes=processes,
    )
    checkpoint = trained(trainer)
    if processes.main:
        publish(checkpoint, trainer, cfg.student)
    processes.wait()


def origin(cfg: DataConfig, about_data: dict[str, Any], init: Path | None) -> dict[str, Any]:
    """What a checkpoint says about the run that makes it."""
    from ..interchange.reading import weights_sha256

    return {
        "dataset": about_data,
        "init": {"sha256": weights_sha256(init)} if init else {},
        "evaluation": {"sampler": cfg.sampler[cfg.evaluation.sampler], "max_steps": cfg.task.max_steps},
        "machine": machine(),
    }


def trained(trainer: Trainer) -> Checkpoint:
    """Trains to the end, from where the run was stopped."""
    if trainer.step:
        print(f"resuming {trainer.folder} at step {trainer.step} of {trainer.settings.n_steps}")
        for step, rate in trainer.learning_rates[1:]:
            print(f"learning_rate={rate} from step {step} on")
    return trainer.run()


def publish(checkpoint: Checkpoint, trainer: Trainer, place: str | None) -> None:
    """Saves the finished policy in the run's folder and at a second place, and prints where."""
    places = [trainer.folder / "checkpoint", *([Path(place)] if place else [])]
    for folder in places:
        checkpoint.save(folder)
    for errors in trainer.validations[-1:]:
        known = ", ".join(f"{name.replace('_', ' ')} {errors[name]:.4g}" for name in errors if name != "step")
        print(f"held-out episodes at step {errors['step']}: {known}")
    for score in trainer.scores[-1:]:
        print(f"score {score['score']:.3f} ± {score['standard_error']:.3f} over {score['n_seeds']} seeds")
    print("\n".join(map(str, places)))


PLANS_OF_A_CURVE = 8


def curves(cfg: TrainConfig, checkpoint: Checkpoint, data: WindowDataset, device: str) -> dict[str, Any]:
    """How many iterations the samplers take whose window is ``auto``, from observations of the dataset."""
    import torch

    from ..calibration import is_auto, iteration_curve
    from ..models.precision import FINEST_TOLERANCE
    from ..policy import Policy
    from ..sampling.picard import no_finer
    from ..sampling.sampler import Sampler

    spec = checkpoint.spec
    samplers = list[Sampler]()
    for sampler in (named_sampler(cfg, name, spec) for name in cfg.sampler):
        if is_auto(sampler):
            drivers = [no_finer(sampler.driver, finest) for finest in (0.0, *FINEST_TOLERANCE.values())]
            distinct = [driver for k, driver in enumerate(drivers) if driver not in drivers[:k]]
            samplers += [replace(sampler, driver=driver) for driver in distinct]
    windows = torch.arange(0, len(data), -(-len(data) // PLANS_OF_A_CURVE))
    observations = list(data.records(windows, spec.contract))
    found: dict[str, Any] = {}
    with bar("iterations by window", len(samplers), "sampler") as measured:
        for sampler in samplers:
            found |= iteration_curve(Policy.from_checkpoint(checkpoint, sampler, device), observations)
            measured.update()
    return found


def training_data(cfg: TrainConfig) -> tuple[WindowDataset, dict[str, Any], PolicySpec]:
    """The dataset's windows, a few words about it, and the spec of the policy trained on it; raises as
    ``dataset_windows`` does."""
    from ..types import PolicySpec

    network = vars(cfg.policy) | {"down_dims": tuple(cfg.policy.down_dims)}
    network["image_features"] *= len(cfg.task.cameras)
    data, about, fields, cameras = dataset_windows(cfg, network)
    agreed = replace(contract(cfg.task), observation=fields, cameras=cameras)
    network["relative"] = agreed.relative_pairs(cfg.policy.relative)
    spec = PolicySpec(
        task=cfg.task.name,
        obs_dim=data.observations.shape[1],
        action_dim=data.actions.shape[1],
        control_hz=task_rate(cfg),
        contract=agreed,
        **network,
    )
    return data, about, spec


def dataset_windows(
    cfg: DataConfig, sizes: Mapping[str, Any]
) -> tuple[WindowDataset, dict[str, Any], tuple[ObservationField, ...], tuple[Camera, ...]]:
    """The dataset's windows, a few words about it, and its observation's fields and cameras.

    Args:
        sizes: ``n_obs_steps``, ``horizon``, ``n_action_steps`` of a window, and more.

    Raises:
        InputError: there is no dataset, or it has not what the task observes.
    """
    import torch

    from ..data.dataset import WindowDataset, recorded_fields
    from ..data.pictures import agreed_cameras
    from ..data.replay_buffer import augmented
    from ..data.selection import episode_weights, trimmed

    path, agreed = locate(cfg.dataset, "dataset"), contract(cfg.task)
    observed = [field.key for field in agreed.observation] + [camera.key for camera in agreed.cameras]
    buffer = opened_buffer(path, observed)
    fields = recorded_fields(buffer, agreed.observation, cfg.task.name)
    cameras = agreed_cameras(buffer, agreed.cameras, cfg.task.name)
    if not fields:
        raise InputError(
            f"task {cfg.task.name!r} observes nothing: list fields of {path} in its file, as "
            f"observation: [{{key: {next(iter(buffer.fields))}}}]"
        )
    keys = [*observed, "action"]
    chosen = buffer if cfg.trim is None else trimmed(buffer, TRIMS.named(cfg.trim), keys)
    data = WindowDataset.of(
        chosen
        if cfg.augmentation is None
        else augmented(chosen, AUGMENTATIONS.named(cfg.augmentation), keys),
        fields,
        **{name: sizes[name] for name in ("n_obs_steps", "horizon", "n_action_steps")},
        cameras=cameras,
    )
    if cfg.weights is not None:
        weights = episode_weights(chosen, partial(WEIGHTS.named(cfg.weights), **cfg.weights_options))
        twins = 1 if cfg.augmentation is None else 2
        data = data.weighted(torch.from_numpy(weights.repeat(twins)))
    about = {
        "name": path.name,
        "n_episodes": buffer.n_episodes,
        "n_steps": buffer.n_steps,
        "fingerprint": buffer.fingerprint(keys),
        "augmentation": cfg.augmentation,
    }
    if cfg.weights is not None:
        about |= {"weights": cfg.weights, "weights_options": cfg.weights_options}
    if cfg.trim is not None:
        about["trim"] = cfg.trim
    return data, about, fields, cameras


def opened_buffer(path: Path, keys: Sequence[str]) -> ReplayBuffer:
    """The episodes of a dataset: a zarr store as it is, others' named observations and actions in memory, as
    ``convert`` would write them.

    Raises:
        InputError: there is no dataset, it is damaged, or its actions can't be converted.
    """
    from tqdm import tqdm

    from ..collection.conversion import Conversion
    from ..data.formats.demonstration import numbers_of
    from ..data.formats.reading import format_of, open_source
    from ..data.replay_buffer import ReplayBuffer, in_memory
    from .convert import note

    if not path.exists() or format_of(path) == "zarr":
        return ReplayBuffer.open(path)
    with contextlib.closing(open_source(path)) as source:
        known = keys if set(keys) <= set(source.keys) else numbers_of(source)  # a line names them all later
        conversion = Conversion(source, to_store=True, keys=known, tell=note)
        with tqdm(source.demos, unit="demo", delay=2, dynamic_ncols=True, leave=False) as demos:
            episodes = ({**d.observations, "action": d.actions} for d in conversion.demonstrations(demos))
            return in_memory(episodes, source.name)


def task_rate(cfg: TaskedConfig) -> float:
    """The task's control steps per second; its environment's, unless it says so itself."""
    from ..environment import control_rate

    if cfg.task.control_hz is not None:
        return cfg.task.control_hz
    with contextlib.closing(env_maker(cfg)()) as env:
        return control_rate(env)


def evaluation(
    cfg: DataConfig, spec: PolicySpec, device: str
) -> Callable[[Checkpoint], dict[str, float | None]]:
    """Scores a checkpoint in closed loop.

    Raises:
        InputError: the environment can't be made, or ``check_env`` refuses it.
    """
    from ..evaluation.episodes import Outcome
    from ..evaluation.rollout import rollout
    from ..evaluation.statistics import standard_error
    from ..policy import Policy
    from ..training.environment import check_env

    setting, make_env = cfg.evaluation, env_maker(cfg, spec)
    with contextlib.closing(make_env()) as env:
        check_env(env, spec)
    sampler, workers = named_sampler(cfg, setting.sampler, spec), env_workers(setting.workers)
    capture = capture_settings(cfg) | {"cache": None}  # weights change
    seeds = range(setting.first_seed, setting.first_seed + setting.seeds)

    def evaluate(checkpoint: Checkpoint) -> dict[str, float | None]:
        policy = Policy.from_checkpoint(checkpoint, sampler, device).captured(**capture)
        with contextlib.closing(workers):  # until the next evaluation
            how: dict[str, Any] = {"success_key": cfg.task.success_key, "scoring": cfg.task.scoring}
            episodes = rollout(policy, make_env, seeds, cfg.task.max_steps, workers=workers, **how)
        outcome = Outcome(name=setting.sampler, episodes=episodes)
        return {
            "score": round(sum(outcome.scores) / len(episodes), 4),
            "standard_error": round(standard_error(outcome.scores), 4),
            "success_rate": outcome.success_rate,
            "n_seeds": len(seeds),
            "first_seed": seeds.start,
        }

    return evaluate

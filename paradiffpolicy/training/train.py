"""Trains a policy on windows of demonstrations, to a checkpoint.

Everything random is a pure function of (seed, step), and learning rate and EMA decay are functions
of the step.  So a resumed run needs only the weights, their averages, AdamW's moments and the step, and
ends with the same weights as a run that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import LARGEST_WEIGHTS, Checkpoint
from ..data.dataset import WindowDataset
from ..data.normalizer import Normalizer
from ..errors import InputError, reading, require_count
from ..files import require_regular, write_atomically, write_json
from ..models.ema import EMA
from ..models.networks import build_network, load_weights, usable_device
from ..models.precision import bfloat16_pays
from ..models.training_unet1d import training_form
from ..types import PolicySpec
from .distributed import OneProcess, backward, require_rows
from .objective import Denoising, MakeObjective, Part, seeded_dropout
from .scalars import ScalarFile
from .settings import TrainSettings

RESUME_FILE = "resume.pt"
DIVERGED_FILE = "diverged.json"
"""Is there when the run diverged after its last save; it may then be resumed with another learning rate."""
CURVE_POINTS = 100
"""Points of the loss curve that a checkpoint keeps, at least, if there are so many."""


Evaluate = Callable[[Checkpoint], dict[str, float | None]]
"""Evaluates the averaged weights, in closed loop or on held-out episodes; returns numbers by name, which are
logged with the step."""


class Trainer:
    """One training run in a folder; ``run`` resumes from the folder's last save.

    Only finite weights are saved.  A run that diverged keeps its last save, and may be resumed with another
    learning rate.

    Args:
        data: the training windows.
        spec: the policy's network, diffusion and shapes.
        settings: of the run.
        folder: for the resume file, TensorBoard scalars and ``checkpoint/``.
        info: the checkpoint's origin, to store with it (dataset, init, …).
        init: a policy to start from, with its normalizers; None: random weights.
        objective: makes what is minimized from the normalised windows, the spec and the settings.
        evaluate: called with the averaged policy every ``evaluate_every`` steps and at the end; None:
            no evaluation, and no environment is needed.
        validate: called with the averaged policy every ``validate_every`` steps and at the end; None: no
            validation.
        device: to compute on.
        processes: that share every batch.

    Raises:
        InputError: the data or ``init`` don't fit the spec, the device can't be used, the folder holds a
            run with another spec, dataset or settings, or a batch has too few windows for the processes.
    """

    def __init__(
        self,
        data: WindowDataset,
        spec: PolicySpec,
        settings: TrainSettings,
        folder: Path,
        *,
        info: dict[str, Any] | None = None,
        init: Checkpoint | None = None,
        objective: MakeObjective = Denoising,
        evaluate: Evaluate | None = None,
        validate: Evaluate | None = None,
        device: torch.device | str = "cpu",
        processes: OneProcess | None = None,
    ) -> None:
        self.settings, self.spec, self.folder, self.info = settings, spec, folder, info or {}
        self.evaluate, self.validate, self.device = evaluate, validate, usable_device(device)
        self.processes = processes or OneProcess()
        _check_data(data, spec)
        require_rows(min(settings.batch_size, len(data)), self.processes.part.count * settings.accumulate)
        if init is not None and replace(init.spec, contract=spec.contract) != spec:
            raise InputError("init has another spec than policy: its weights wouldn't mean the same")
        self.observation_normalizer = (
            init.observation_normalizer if init else Normalizer.fit(data.observations)
        )
        data = data.relative_to(spec.relative)
        self.action_normalizer = init.action_normalizer if init else data.action_normalizer()
        self.data = data.normalized(self.observation_normalizer, self.action_normalizer, self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = build_network(spec).to(self.device)
        if init is not None:
            load_weights(spec, self.network, init.weights)
        self.ema = EMA(self.network)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.network, settings.weight_decay),
            betas=(0.95, 0.999),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.objective = objective(self.data, spec, settings)
        self.step, self.seconds = 0, 0.0
        self.losses: list[Tensor] = []  # since the last point of the curve
        self.curve: list[list[float]] = []
        self.scores: list[dict[str, float | None]] = []
        self.validations: list[dict[str, float | None]] = []
        self.learning_rates: list[list[float]] = [[0, settings.learning_rate]]  # from which step on
        auto = settings.precision == "auto"
        self.autocast = bfloat16_pays(self.device) if auto else settings.precision == "bfloat16"
        self.form = self.processes.prepare(training_form(self.network, self.device, self.autocast))
        if (folder / RESUME_FILE).exists():
            self._resume()
        self.processes.require_same_step(self.step, folder)

    def run(self, until: int | None = None, progress: bool = True) -> Checkpoint:
        """Trains to step ``until`` (default: ``n_steps``) and returns the averaged policy.  Of several
        processes the first writes, logs and evaluates; meanwhile the others wait in their next step.

        Raises:
            InputError: the loss or a weight is no longer finite, or nothing can be written.
        """
        settings, n_steps = self.settings, self.settings.n_steps
        if until is not None:
            require_count(until=until)
        until = n_steps if until is None else min(until, n_steps)
        if not self.processes.main:
            while self.step < until:
                self.update()
            return self.checkpoint()
        steps = {"total": n_steps, "initial": self.step, "unit": "step"}
        with (
            ScalarFile(self.folder / "tensorboard", self.step) as scalars,
            tqdm(**steps, disable=not progress, dynamic_ncols=True) as bar,
        ):
            self._evaluate(scalars)  # a run may have been killed between a save and its evaluation
            started = time.monotonic()
            while self.step < until:
                self.losses.append(self.update())
                bar.update()
                if self.validate and (self.step % settings.validate_every == 0 or self.step == n_steps):
                    self.seconds += time.monotonic() - started
                    self._validate(self.validate, scalars)
                    started = time.monotonic()
                if self.step % settings.log_every == 0 or self.step == n_steps:
                    bar.set_postfix(loss=f"{self._log(scalars):.4f}", **self._validated())
                if self._evaluation_is_due or self.step % settings.save_every == 0 or self.step == until:
                    self.seconds += time.monotonic() - started
                    self._save()
                    self._evaluate(scalars)
                    started = time.monotonic()
        return self.checkpoint()

    def _log(self, scalars: ScalarFile) -> float:
        """Adds the mean loss since the last call to the curve."""
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss}")
        self.curve.append([self.step, loss])
        scalars.add(self.step, loss=loss, learning_rate=self.settings.learning_rate_at(self.step - 1))
        return loss

    def _validate(self, validate: Evaluate, scalars: ScalarFile) -> None:
        """Adds the averaged policy's errors on held-out episodes to the run."""
        self._require_finite()
        errors = validate(self.checkpoint())
        self.validations.append({"step": self.step, **errors})
        known = {f"validation/{name}": value for name, value in errors.items() if value is not None}
        scalars.add(self.step, **known)

    def _validated(self) -> dict[str, str]:
        """The last validation, for the progress bar."""
        last = self.validations[-1] if self.validations else {}
        return {f"held_out_{k}": f"{v:.4f}" for k, v in last.items() if k != "step" and v is not None}

    def _require_finite(self) -> None:
        """Ends the run where it has diverged: what would be saved is of no use."""
        if not _are_finite(self.network) or not _are_finite(self.ema.network):
            self._diverged("weights aren't finite, or over half precision's 65504,")
        if self.losses and not torch.stack(self.losses).isfinite().all():
            self._diverged("the loss isn't finite")

    def _diverged(self, reason: str) -> NoReturn:
        """Notes beside the last save that the run diverged."""
        rate = self.settings.learning_rate
        saved = (self.folder / RESUME_FILE).exists()
        if saved:
            write_json(self.folder / DIVERGED_FILE, {"step": self.step, "learning_rate": rate})
        kept = f"what {self.folder} last saved is kept: resume it" if saved else "train"
        raise InputError(f"{reason} at step {self.step}: {kept} with a training.learning_rate below {rate}")

    @property
    def _evaluation_is_due(self) -> bool:
        """Whether this step is one after which the policy is evaluated, and it wasn't yet."""
        every, known = self.settings.evaluate_every, any(score["step"] == self.step for score in self.scores)
        wanted = self.step == self.settings.n_steps or (every and self.step and self.step % every == 0)
        return bool(self.evaluate and wanted and not known)

    def _evaluate(self, scalars: ScalarFile) -> None:
        """Evaluates the checkpoint on disk, if it is due."""
        if self.evaluate is None or not self._evaluation_is_due:
            return
        self.checkpoint().save(self.folder / "checkpoint")
        score = self.evaluate(Checkpoint.load(self.folder / "checkpoint"))
        self.scores.append({"step": self.step, **score})
        known = {f"evaluation/{name}": value for name, value in score.items() if value is not None}
        scalars.add(self.step, **known)
        self._save()

    def update(self) -> Tensor:
        """Takes one optimizer step; returns its loss, a scalar on the device."""
        settings, step = self.settings, self.step
        self.optimizer.zero_grad()

        def share(part: Part) -> Tensor:
            with seeded_dropout(settings, step, self.device, part):
                return self.objective(self.form, step, self.autocast, part)

        loss = backward(self.processes, self.form, share, settings.accumulate)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        self.optimizer.step()
        self.step = step + 1
        self.ema.update(self.network, self.step)
        return loss

    def checkpoint(self) -> Checkpoint:
        """The averaged weights, with the run's settings, loss curve and evaluations."""
        training = {
            "settings": vars(self.settings),
            "step": self.step,
            "minutes": round(self.seconds / 60, 1),
            "n_windows": len(self.data),
            "loss_curve": [[step, round(loss, 5)] for step, loss in _thinned(self.curve)],
            "scores": self.scores,
        }
        if self.validations:
            training["validations"] = _thinned(self.validations)
        if len(self.learning_rates) > 1:
            training["learning_rates"] = self.learning_rates
        return Checkpoint(
            self.spec,
            dict(self.ema.network.state_dict()),
            self.observation_normalizer,
            self.action_normalizer,
            {**self.info, "training": training},
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the weights: a run can only be resumed with the same."""
        settings = {k: v for k, v in vars(self.settings).items() if not k.endswith(("_every", "accumulate"))}
        origin = {part: self.info.get(part, {}) for part in ("dataset", "init", "teacher")}
        return {"spec": asdict(self.spec), "settings": settings, **origin}

    def _save(self) -> None:
        self._require_finite()
        state = {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "curve": self.curve,
            "scores": self.scores,
            "validations": self.validations,
            "learning_rates": self.learning_rates,
            "network": self.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomically(self.folder / RESUME_FILE, partial(_save_state, state))
        (self.folder / DIVERGED_FILE).unlink(missing_ok=True)
        self.checkpoint().save(self.folder / "checkpoint")

    def _resume(self) -> None:
        path = self.folder / RESUME_FILE
        require_regular(path, LARGEST_WEIGHTS)
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            reason = type(error).__name__
            raise InputError(f"{path} can't be read ({reason}): delete it to start the run again")
        with reading(str(path), "delete it to start the run again"):
            self._restore(state)
        if not _are_finite(self.network) or not _are_finite(self.ema.network):
            raise InputError(f"{path} has weights that aren't finite: delete it to start the run again")

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes a saved state, if it is this run's; raises anything for what none can be."""
        kinds = {"step": int, "seconds": int | float, "losses": list, "curve": list, "scores": list}
        for name, kind in kinds.items():
            if not isinstance(state[name], kind):
                raise TypeError(f"its {name} can't be {type(state[name]).__name__}")
        if not 0 <= state["step"] <= self.settings.n_steps or not math.isfinite(state["seconds"]):
            raise ValueError(f"its step or seconds can't be: {state['step']}, {state['seconds']}")
        rates = state.get("learning_rates", self.learning_rates)
        self.learning_rates = [[step, rate] for step, rate in rates]
        for part, wanted in self._identity().items():
            saved = state["identity"][part]
            if part == "spec":
                saved = asdict(PolicySpec.from_dict(saved))  # older ones lack settings
            if part == "settings" and (self.folder / DIVERGED_FILE).exists():
                rate = saved["learning_rate"] = wanted["learning_rate"]
                if rate != self.learning_rates[-1][1]:
                    self.learning_rates.append([state["step"], rate])
            names = {**wanted, **saved}
            others = [
                f"{k}={saved.get(k)} there, {wanted.get(k)} here"
                for k in names
                if saved.get(k) != wanted.get(k)
            ]
            if others:
                raise InputError(
                    f"{self.folder} holds a run with another {part} ({'; '.join(others)}): "
                    "choose another run=FOLDER, or delete that one"
                )
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.scores = (
            state["losses"],
            [{"step": each["step"], **each} for each in state["scores"]],
        )
        self.validations = [{"step": each["step"], **each} for each in state.get("validations", [])]
        self.curve = [[step, loss] for step, loss in state["curve"]]
        self.network.load_state_dict(state["network"])
        self.ema.network.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A network's parameters for AdamW: all decay but those that its attribute ``undecayed`` names, if it has
    one."""
    kept: set[str] = getattr(network, "undecayed", set())
    decayed, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in network.named_parameters():
        (others if name in kept else decayed).append(parameter)
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _thinned(points: list[Any]) -> list[Any]:
    """Some ``CURVE_POINTS`` of a curve, always with the last one."""
    return points[::-1][:: max(1, len(points) // CURVE_POINTS)][::-1]


def _check_data(data: WindowDataset, spec: PolicySpec) -> None:
    """Makes sure that windows are what a spec's policy takes and gives."""
    if not len(data) or len(data.observations) != len(data.actions):
        raise InputError(
            f"{len(data)} windows of {len(data.observations)} observations and {len(data.actions)} actions "
            "can't be trained on: as many observations as actions, and a window at least"
        )
    sizes = data.n_obs_steps, data.observations.shape[-1], data.steps.shape[-1], data.actions.shape[-1]
    wanted = spec.n_obs_steps, spec.obs_dim, spec.horizon, spec.action_dim
    for name, size, want in zip(
        ("n_obs_steps", "obs_dim", "horizon", "action_dim"), sizes, wanted, strict=True
    ):
        if size != want:
            raise InputError(f"the data's windows have {name}={size}, the policy {want}: cut them alike")


def _are_finite(network: torch.nn.Module) -> bool:
    """Whether all weights are, also in a checkpoint's half precision."""
    return bool(torch.stack([w.half().isfinite().all() for w in network.state_dict().values()]).all())


def _save_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of its own, where the file raised the system's
            raise error.__context__ if isinstance(error.__context__, OSError) else error

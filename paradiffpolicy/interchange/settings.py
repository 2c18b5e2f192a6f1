"""Settings that another project wrote, read by name and type."""

from __future__ import annotations

from types import UnionType
from typing import Any

from ..errors import InputError

REQUIRED: Any = object()
IMPORTED = "imported"
"""The task of a checkpoint that names none: it drives whatever task its sizes fit."""


class Settings:
    """Nested settings.

    Args:
        values: as they were read.
        where: for messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where}: its settings aren't a mapping: copy the checkpoint again")
        self.values, self.where = values, where

    def get(self, key: str, kind: type | UnionType, default: Any = REQUIRED) -> Any:
        """A setting by its dotted name.

        Raises:
            InputError: it is missing and has no default, or is of another type.
        """
        value: Any = self.values
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                if default is REQUIRED:
                    raise InputError(f"{self.where}: setting {key} is missing")
                return default
            value = value[name]
        number = kind is float and isinstance(value, int)
        wrong = isinstance(value, bool) and kind is not bool
        if wrong or not (isinstance(value, kind) or number):
            raise InputError(f"{self.where}: {key}={value!r:.60} isn't of the kind that was expected")
        return float(value) if number else value

    def part(self, key: str) -> Settings:
        """The settings in a setting."""
        return Settings(self.get(key, dict), f"{self.where}, {key}")

    def refused(self, key: str, value: Any, why: str) -> InputError:
        """An error about a setting."""
        return InputError(f"{self.where}: {key}={value!r:.80}: {why}")


def scheduler_fields(settings: Settings, kind: str, n_steps: int | None) -> dict[str, Any]:
    """A noise scheduler of diffusers as fields of a ``PolicySpec``.

    Args:
        kind: ``DDPM`` or ``DDIM``.
        n_steps: of inference; None: as many as in training.

    Raises:
        InputError: an option has no equal here.
    """
    if kind not in ("DDPM", "DDIM"):
        raise settings.refused("noise scheduler", kind, "DDPM and DDIM are known")
    for key, known in (
        ("variance_type", ("fixed_small", "fixed_small_log")),
        ("timestep_spacing", ("leading",)),
        ("steps_offset", (0,)),
        ("set_alpha_to_one", (True,)),
        ("thresholding", (False,)),
        ("rescale_betas_zero_snr", (False,)),
        ("trained_betas", (None,)),
    ):
        value = settings.values.get(key, known[0])
        if value not in known:
            raise settings.refused(key, value, f"only {known[0]!r} is supported")
    trained = settings.get("num_train_timesteps", int, 100)
    sampler = {"solver": kind.lower(), "n_steps": n_steps or trained, "spacing": "leading"}
    clip = settings.get("clip_sample_range", float, 1.0) if settings.get("clip_sample", bool, True) else None
    return {
        "schedule": settings.get("beta_schedule", str),
        "n_train_steps": trained,
        "beta_start": settings.get("beta_start", float, 1e-4),
        "beta_end": settings.get("beta_end", float, 0.02),
        "prediction": settings.get("prediction_type", str, "epsilon"),
        "clip": clip,
        "sampler": sampler | ({"keeps_epsilon": True} if kind == "DDIM" and clip is not None else {}),
    }

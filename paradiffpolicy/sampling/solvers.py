r"""Solvers, each a function from schedule and timesteps to a ``Tableau``.

Notation: ``a_t = alpha_t``, ``s_t = sigma_t`` of the schedule (``a^2 + s^2 = 1``); a step goes from
``t = t_i`` to ``t' = t_{i+1}``, the last one to the clean sample (``a = 1``, ``s = 0``).
``lambda = log(a / s)``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..diffusion.schedule import CLEAN, NoiseSchedule
from ..errors import InputError, nearest
from .tableau import Tableau


def leading(n_train_steps: int, n_steps: int) -> Tensor:
    """``…, 2k, k, 0`` with ``k = n_train_steps // n_steps``: never sees the last timesteps."""
    return torch.arange(n_steps - 1, -1, -1) * (n_train_steps // n_steps)


def trailing(n_train_steps: int, n_steps: int) -> Tensor:
    """From the last timestep in equal strides: never sees the first ones (Lin et al. 2024)."""
    stride = n_train_steps / n_steps
    times = np.round(np.arange(n_train_steps, 0, -stride))[:n_steps] - 1
    return torch.from_numpy(times.astype(np.int64))


def linspace(n_train_steps: int, n_steps: int) -> Tensor:
    """Both ends, and equal strides between them, rounded."""
    times = np.linspace(0, n_train_steps - 1, n_steps).round()[::-1]
    return torch.from_numpy(times.astype(np.int64))


SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


class _Steps:
    """The schedule's values at both ends of every step, ``[N]`` each."""

    def __init__(self, schedule: NoiseSchedule, timesteps: Tensor) -> None:
        self.timesteps = timesteps
        nexts = torch.cat((timesteps[1:], torch.tensor([CLEAN])))
        self.alpha, self.sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
        self.alpha_next, self.sigma_next = schedule.alpha(nexts), schedule.sigma(nexts)
        self.beta = 1 - (self.alpha / self.alpha_next) ** 2
        """Variance that the forward process adds from ``t'`` to ``t``."""
        self.posterior_variance = (self.sigma_next / self.sigma) ** 2 * self.beta
        """Variance of ``q(x_t' | x_t, x_0)``, Ho et al. 2020, equation 7."""

    def one_step(self, a: Tensor, b: Tensor, c: Tensor) -> Tableau:
        """The table of ``x_{i+1} = a_i x_i + b_i D_i + c_i z_i``."""
        return Tableau.from_steps(self.timesteps, a, b.diag(), c.diag(), self.posterior_variance)


def ddpm(schedule: NoiseSchedule, timesteps: Tensor, variance: str = "fixed_small") -> Tableau:
    """Ancestral sampling, Ho et al. 2020, equations 6 and 7, with timesteps left out as in
    Nichol & Dhariwal 2021.  ``variance``: ``fixed_small`` is the posterior's, ``fixed_large`` the
    forward step's beta.  The last step adds no noise.  First order."""
    k = _Steps(schedule, timesteps)
    variances = {"fixed_small": k.posterior_variance, "fixed_large": k.beta}
    if variance not in variances:
        raise InputError(f"unknown variance {variance!r}{nearest(variance, variances)}")
    a = k.alpha / k.alpha_next * (k.sigma_next / k.sigma) ** 2
    b = k.alpha_next * k.beta / k.sigma**2
    c = variances[variance].sqrt()
    c[-1] = 0
    return k.one_step(a, b, c)


def ddim(schedule: NoiseSchedule, timesteps: Tensor, eta: float = 0.0) -> Tableau:
    """Song et al. 2021, equation 12: ``x' = a' D + sqrt(s'^2 - c^2) eps + c z`` with ``eps`` from
    the (clipped) ``D`` and ``c = eta`` times DDPM's standard deviation.  Eta 0 is the ODE's
    exponential Euler step (DPM-Solver++(1)), eta 1 is DDPM.  First order."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta} must lie between 0 (deterministic) and 1 (DDPM)")
    k = _Steps(schedule, timesteps)
    c = eta * k.posterior_variance.sqrt()
    a = (k.sigma_next**2 - c**2).clamp(min=0).sqrt() / k.sigma
    b = k.alpha_next - a * k.alpha
    return k.one_step(a, b, c)


def dpm_solver_pp_2m(schedule: NoiseSchedule, timesteps: Tensor) -> Tableau:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: exponential integrator in lambda with the
    data prediction extrapolated from the last two nodes.  First order on the first step, and on
    the last, where lambda is infinite.  Second order, one network call per step."""
    k = _Steps(schedule, timesteps)
    n = len(timesteps)
    a = k.sigma_next / k.sigma
    b = k.alpha_next - a * k.alpha
    lambdas = (k.alpha / k.sigma).log()
    h = lambdas.diff()
    S = b.diag()
    for i in range(1, n - 1):
        w = b[i] * h[i] / (2 * h[i - 1])
        S[i, i] += w
        S[i, i - 1] -= w
    return Tableau.from_steps(timesteps, a, S, torch.zeros_like(S), k.posterior_variance)


SOLVERS: dict[str, Callable[..., Tableau]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}


def solver_tableau(
    schedule: NoiseSchedule, solver: str, n_steps: int, spacing: str = "leading", **options: object
) -> Tableau:
    """The table of a solver by name.

    Args:
        solver: a name in ``SOLVERS``; ``options`` go to it.
        n_steps: network calls of a sequential walk, at most the schedule's timesteps.
        spacing: a name in ``SPACINGS``.

    Raises:
        InputError: a name is unknown, ``n_steps`` doesn't fit the schedule, or the solver refuses
            an option.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    if spacing not in SPACINGS:
        raise InputError(f"unknown timestep spacing {spacing!r}{nearest(spacing, SPACINGS)}")
    if not isinstance(n_steps, int) or not 0 < n_steps <= schedule.n_train_steps:
        raise InputError(
            f"n_steps={n_steps} must be 1 to {schedule.n_train_steps}, the policy's training steps"
        )
    timesteps = SPACINGS[spacing](schedule.n_train_steps, n_steps)
    try:
        return SOLVERS[solver](schedule, timesteps, **options)
    except TypeError as error:
        raise InputError(f"solver {solver!r} doesn't take {', '.join(options)} ({error})")

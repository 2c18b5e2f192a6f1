"""The reference solution: scipy's adaptive Dormand-Prince 5(4) on the probability flow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from ..diffusion.denoiser import BoundDenoise
from ..diffusion.schedule import CLEAN, NoiseSchedule
from ..errors import InputError, require_positive
from ..types import Noise, Solution
from .driver import evaluate_all, on_nodes
from .tableau import Tableau


def probability_flow(
    denoise: BoundDenoise,
    tableau: Tableau,
    noise: Noise,
    schedule: NoiseSchedule,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> Solution:
    """Solves ``dz/dr = D``, with ``z = x / sigma`` and ``r = alpha / sigma``, between a table's first and
    last time with error control, each batch element with its own steps.

    Takes of the table the times alone: this is the flow that its ODE solver approximates.  The step to
    the clean sample is ``x_0 = D``, as everywhere.  Slow: for tests and for measuring solvers.

    Args:
        rtol, atol: of the local error, in normalised units.

    Raises:
        InputError: the table is stochastic, or a tolerance isn't positive.
    """
    require_positive(rtol=rtol, atol=atol)
    if tableau.stochastic:
        raise InputError("the probability flow has no noise: choose a solver without noise, as ddim")
    x_T, batch = noise.x_T, len(noise.x_T)
    times = tableau.timesteps.tolist() + ([] if tableau.end == CLEAN else [tableau.end])
    points = [schedule.at(t) for t in times]
    # Tables of several stages come to a time more than once.
    ratios, place = np.unique([point.alpha / point.sigma for point in points], return_inverse=True)
    zs = np.empty((batch, len(points), x_T[0].numel()))
    calls = torch.zeros(batch, dtype=torch.int64, device=x_T.device)
    for b in range(batch):
        element = torch.tensor([b], device=x_T.device)

        def slope(r: float, z: NDArray[Any], element: Tensor = element) -> NDArray[Any]:
            at = schedule.at(schedule.timestep(math.log(r) if r > 0 else -math.inf))
            x = torch.from_numpy(at.sigma * z).to(x_T).view(1, *x_T.shape[1:])
            D = denoise(x, x_T.new_tensor([at.time]), element)
            return D.flatten().cpu().double().numpy()

        initial = (x_T[b].cpu().double() / points[0].sigma).flatten().numpy()
        span = (ratios[0], ratios[-1])
        solved = solve_ivp(slope, span, initial, "RK45", ratios, rtol=rtol, atol=atol)
        if not solved.success:
            raise RuntimeError(f"RK45 failed at alpha / sigma = {solved.t[-1]:.3g}: {solved.message}")
        zs[b], calls[b] = solved.y.T[place], solved.nfev
    sigmas = np.array([point.sigma for point in points])[:, None]
    x = torch.from_numpy(np.swapaxes(zs * sigmas, 0, 1)).to(x_T).view(len(points), *x_T.shape)
    n = tableau.n_nodes
    node = torch.arange(n, device=x_T.device)[:, None].expand(n, batch)
    at_nodes = on_nodes(denoise, tableau.timesteps.to(x_T))
    x0_hats = evaluate_all(at_nodes, x[:n], node, torch.ones_like(node, dtype=torch.bool))
    sample = x0_hats[-1] if tableau.end == CLEAN else x[-1]
    return Solution(sample, x0_hats, noise, iterations=calls + 1, nfe=calls + n)

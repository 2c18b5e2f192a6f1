r"""Drafts: what a network will give at nodes where it has not been called, as if plans were Brownian motions.

A node whose plan is known is ``x_i = alpha_i x_0 + sigma_i eps``, with ``alpha_i = sum_j B_ij`` and
``sigma_i^2 = p_i^2 + sum_j C_ij^2``.  For a plan drawn from ``N(mean, Sigma)`` the best x0_hat is linear:

    D_i(x) = mean + K_i (x - alpha_i mean),     K_i = alpha_i Sigma (alpha_i^2 Sigma + sigma_i^2)^-1

Sigma is that of a Brownian motion along the horizon: the next actions are certain, later ones less and less.
A mean is known for every node where the network has been called, the one that explains its output, and
serves there and beyond.  So a draft follows the noise: outputs are a martingale along the nodes, and what
they will change by is what the noise tells.  With ``x = drift + B D(x)`` all nodes of a draft are known at
once, ``x = (I - B K)^-1 (drift + B (1 - K alpha) mean)``, in the basis in which Sigma is diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tableau import Tableau


class Draft:
    """Drafts nodes of a table.  Tensors in Sigma's basis are ``[nodes, batch, directions, …]``.

    Args:
        like: ``[batch, T, …]``, of the precision and on the device to compute in.
        spread: the variance of a plan's last step; 0: the network gives the mean, whatever the node.
    """

    def __init__(self, tableau: Tableau, like: Tensor, spread: float) -> None:
        self.n, self.shape = tableau.n_nodes, like.shape[1:]
        # Without a spread all directions are alike: one will do.
        size = like.shape[1] if spread and like.ndim > 1 else 1
        step = torch.arange(1, size + 1, dtype=torch.float64) / size
        variance, basis = torch.linalg.eigh(spread * torch.minimum(step[:, None], step))
        p, B, C = tableau.p[: self.n], tableau.B[: self.n], tableau.C[: self.n]
        alpha = B.sum(dim=1)[:, None]
        sigma2 = (p.square() + C.square().sum(dim=1))[:, None]
        gain = alpha * variance / (alpha.square() * variance + sigma2)  # [N, directions]
        share = 1 - gain * alpha
        given = torch.cat((p[:, None], C), dim=1).expand(len(variance), -1, -1)
        table = torch.cat((given, B * share.T[:, None]), dim=2)
        solved = torch.linalg.solve(torch.eye(self.n, dtype=torch.float64) - B * gain.T[:, None], table)
        self.basis, self.table = basis.to(like), solved.to(like)
        self.gain, self.share = gain.to(like), share.to(like)

    def turned(self, values: Tensor) -> Tensor:
        """``values`` ``[nodes, batch, T, A]`` in Sigma's basis."""
        return self.basis.T @ values.reshape(*values.shape[:2], len(self.basis), -1)

    def back(self, values: Tensor) -> Tensor:
        """The inverse of ``turned``."""
        return (self.basis @ values).reshape(*values.shape[:2], *self.shape)

    def nodes(self, index: Tensor, x_T: Tensor, z: Tensor, means: Tensor) -> Tensor:
        """Inputs of nodes ``index`` ``[W, batch]``, for ``x_T`` ``[1, batch, …]`` and the N nodes' noise and
        means."""
        values = torch.cat((x_T, z, means)).permute(1, 2, 0, 3)
        rows = self.table.index_select(1, index.flatten()).view(-1, *index.shape, self.table.shape[-1])
        return (rows.permute(2, 0, 1, 3) @ values).permute(2, 0, 1, 3)

    def output(self, index: Tensor, x: Tensor, means: Tensor) -> Tensor:
        """The x0_hats that the draft expects at nodes ``index`` with inputs ``x``."""
        return self._at(self.share, index) * means + self._at(self.gain, index) * x

    def mean(self, index: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The means that explain what the network gave at nodes ``index`` with inputs ``x``."""
        return (output - self._at(self.gain, index) * x) / self._at(self.share, index)

    def _at(self, values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(0, index.flatten()).view(*index.shape, -1, 1)

"""The 1-D temporal U-Net of Diffusion Policy (Chi et al. 2023, section 3 and appendix A).

Module names and shapes are those of diffusion_policy's ``ConditionalUnet1D`` with global
conditioning, so that its published state dicts load unchanged.  Tensors inside the network are
``[batch, channels, horizon]``; its interface is ``[batch, horizon, action]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn


class SinusoidalPosEmb(nn.Module):
    """Timesteps ``[batch]`` to ``[batch, dim]``: sines, then cosines, of geometric frequencies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        # On the CPU wherever the rest is made: no state dict has them, so the meta device would lose them.
        frequencies = torch.exp(torch.arange(half, device="cpu") * (-math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: Tensor

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Downsample1d(nn.Module):
    """Halves the horizon: ``[batch, dim, T]`` to ``[batch, dim, T/2]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample1d(nn.Module):
    """Doubles the horizon: ``[batch, dim, T]`` to ``[batch, dim, 2T]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, dim, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


FINAL_GROUPS = 8
"""Of the last block's GroupNorm, whatever ``n_groups`` is: diffusion_policy and LeRobot leave it at its
default, which published weights were trained with."""


class Conv1dBlock(nn.Module):
    """Conv1d, GroupNorm, Mish; the horizon keeps its length."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, out_channels),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ConditionalResidualBlock1D(nn.Module):
    """Two conv blocks with FiLM between them (Perez et al. 2018): ``scale * h + bias`` from the
    condition, or only ``h + bias`` without ``predict_scale``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        kernel_size: int,
        n_groups: int,
        predict_scale: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                Conv1dBlock(in_channels, out_channels, kernel_size, n_groups),
                Conv1dBlock(out_channels, out_channels, kernel_size, n_groups),
            ]
        )
        self.predict_scale = predict_scale
        self.cond_encoder = nn.Sequential(
            nn.Mish(),
            nn.Linear(cond_dim, out_channels * (2 if predict_scale else 1)),
        )
        self.residual_conv = (
            nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    @property
    def film_layer(self) -> nn.Linear:
        """From mish(condition) to scale and bias."""
        return cast(nn.Linear, self.cond_encoder[1])

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """``x`` ``[batch, in_channels, T]`` and what ``film_layer`` gives, ``[batch, film]``, to
        ``[batch, out_channels, T]``."""
        h = self.blocks[0](x)
        if self.predict_scale:
            scale, bias = film[:, :, None].chunk(2, dim=1)
            h = scale * h + bias
        else:
            h = h + film[:, :, None]
        return self.blocks[1](h) + self.residual_conv(x)


class ConditionalUnet1D(nn.Module):
    """Predicts the denoising target of an action sequence from its noisy version.

    A FiLM layer is linear in ``mish(cat(time, condition))``, so it is the sum of a part for the
    timestep and a part for the condition.  ``time_features`` and ``condition_features`` give them for all
    layers side by side, and ``trunk`` is what is left: a sampler needs the first once per policy, the
    second once per plan, and only their sum and the trunk in every network call.

    Args:
        input_dim: action dimension A.
        global_cond_dim: size G of the flattened observation window.
        diffusion_step_embed_dim: size of the timestep embedding.
        down_dims: channels of the levels; each but the last halves the horizon.
        kernel_size, n_groups: of the conv blocks; the last one has ``FINAL_GROUPS``.
        cond_predict_scale: FiLM with a scale, not only a bias.

    Raises:
        ValueError: ``down_dims`` is empty or not divisible by ``n_groups``, or the first by ``FINAL_GROUPS``;
            ``kernel_size`` is even, or ``diffusion_step_embed_dim`` is odd.
    """

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int,
        diffusion_step_embed_dim: int = 256,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        cond_predict_scale: bool = True,
    ) -> None:
        super().__init__()
        if not down_dims or any(dim % n_groups for dim in down_dims):
            raise ValueError(f"every one of {down_dims=} must be a multiple of {n_groups=}")
        if down_dims[0] % FINAL_GROUPS:
            raise ValueError(f"{down_dims[0]=} must be a multiple of {FINAL_GROUPS}, the last block's groups")
        if kernel_size % 2 == 0:
            raise ValueError(f"{kernel_size=} must be odd: the horizon keeps its length")
        if diffusion_step_embed_dim % 2 or diffusion_step_embed_dim < 4:
            raise ValueError(f"{diffusion_step_embed_dim=} must be even, and at least 4: sines and cosines")
        self.input_dim = input_dim
        self.global_cond_dim = global_cond_dim
        self.horizon_multiple = 2 ** (len(down_dims) - 1)

        dsed = diffusion_step_embed_dim
        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalPosEmb(dsed), nn.Linear(dsed, 4 * dsed), nn.Mish(), nn.Linear(4 * dsed, dsed)
        )

        def residual(dim_in: int, dim_out: int) -> ConditionalResidualBlock1D:
            return ConditionalResidualBlock1D(
                dim_in, dim_out, dsed + global_cond_dim, kernel_size, n_groups, cond_predict_scale
            )

        levels = list(zip([input_dim, *down_dims[:-1]], down_dims, strict=True))
        widest = down_dims[-1]
        self.mid_modules = nn.ModuleList([residual(widest, widest), residual(widest, widest)])
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [
                    residual(dim_in, dim_out),
                    residual(dim_out, dim_out),
                    Downsample1d(dim_out) if level < len(levels) - 1 else nn.Identity(),
                ]
            )
            for level, (dim_in, dim_out) in enumerate(levels)
        )
        self.up_modules = nn.ModuleList(
            nn.ModuleList([residual(2 * dim_out, dim_in), residual(dim_in, dim_in), Upsample1d(dim_in)])
            for dim_in, dim_out in reversed(levels[1:])
        )
        self.final_conv = nn.Sequential(
            Conv1dBlock(down_dims[0], down_dims[0], kernel_size, FINAL_GROUPS),
            nn.Conv1d(down_dims[0], input_dim, 1),
        )

    @property
    def residual_blocks(self) -> list[ConditionalResidualBlock1D]:
        """In the order in which they are run, which is the order of their FiLM parts."""
        levels = [*self.down_modules, *self.up_modules]
        blocks = [cast(nn.ModuleList, level)[:2] for level in levels]
        blocks.insert(len(self.down_modules), self.mid_modules)
        return [cast(ConditionalResidualBlock1D, block) for pair in blocks for block in pair]

    @property
    def film_sizes(self) -> list[int]:
        """Of the blocks' FiLM parts; F is their sum."""
        return [block.film_layer.out_features for block in self.residual_blocks]

    def time_features(self, timestep: Tensor) -> Tensor:
        """The FiLM layers' part for timesteps ``[n]``, biases included: ``[n, F]``."""
        embedding = self.diffusion_step_encoder(timestep)
        features, size = nn.functional.mish(embedding), embedding.shape[-1]
        layers = [block.film_layer for block in self.residual_blocks]
        parts = [nn.functional.linear(features, layer.weight[:, :size], layer.bias) for layer in layers]
        return torch.cat(parts, dim=-1)

    def condition_features(self, global_cond: Tensor) -> Tensor:
        """The FiLM layers' part for conditions ``[batch, G]``: ``[batch, F]``."""
        features, size = nn.functional.mish(global_cond), self.global_cond_dim
        layers = [block.film_layer for block in self.residual_blocks]
        parts = [
            nn.functional.linear(features, layer.weight[:, layer.in_features - size :]) for layer in layers
        ]
        return torch.cat(parts, dim=-1)

    def combine(self, time: Tensor, condition: Tensor) -> Tensor:
        """The FiLM layers' output ``[batch, F]``, of its two parts."""
        return time + condition

    def trunk(self, sample: Tensor, film: Tensor) -> Tensor:
        """``sample`` ``[batch, T, A]`` and ``film`` ``[batch, F]``, both parts added, to
        ``[batch, T, A]``."""
        x = rearrange(sample, "b t a -> b a t")
        films = iter(film.split(self.film_sizes, dim=-1))
        skips = []
        for level in self.down_modules:
            first, second, downsample = cast(nn.ModuleList, level)
            x = second(first(x, next(films)), next(films))
            skips.append(x)
            x = downsample(x)
        for block in self.mid_modules:
            x = block(x, next(films))
        for level in self.up_modules:
            first, second, upsample = cast(nn.ModuleList, level)
            x = torch.cat((x, skips.pop()), dim=1)
            x = upsample(second(first(x, next(films)), next(films)))
        return rearrange(self.final_conv(x), "b a t -> b t a")

    def forward(self, sample: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        """One network call.

        Args:
            sample: ``[batch, T, A]``, T a multiple of ``horizon_multiple``.
            timestep: ``[batch]``, index into the noise schedule.
            global_cond: ``[batch, G]``.

        Returns:
            ``[batch, T, A]``: epsilon, x0 or v, whatever it was trained for.
        """
        film = self.combine(self.time_features(timestep), self.condition_features(global_cond))
        return self.trunk(sample, film)

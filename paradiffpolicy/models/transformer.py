r"""The Diffusion Transformer of Diffusion Policy (Chi et al. 2023, section 3.1 and appendix A: DP-T).

A step of the noisy action sequence is a token.  Tokens attend to each other, and to a memory of ``1 + To``
tokens: the timestep's, then one for each observation of the window:

    memory = encoder(cat(sinusoid(t), W_o o_1, …, W_o o_To) + positions)
    x      = W_x x_t + positions
    x      = layer(x, memory)    n_layer times: self-attention, cross-attention, MLP, each on LayerNorm(x)
    output = head(LayerNorm(x))

Under the causal mask a step attends to itself and those before it, and to the observations up to its own
time; to the timestep always.

Module names and shapes are those of diffusion_policy's ``TransformerForDiffusion`` with observations as its
condition, so that its state dicts load unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError, is_number
from .unet1d import SinusoidalPosEmb

DERIVED = ("mask", "memory_mask", "_dummy_variable")
"""Entries of diffusion_policy's state dicts that hold nothing learnt."""

LONGEST = 1024
"""Steps of a plan, and of an observation window, at most: masks and attention grow with their square."""


@dataclass(frozen=True)
class TransformerOptions:
    """The transformer's own settings; defaults are diffusion_policy's for low-dimensional PushT.

    Attributes:
        n_layer, n_head, n_emb: decoder layers, heads of their attention, and the width of tokens.
        p_drop_emb, p_drop_attn: dropout in training, of embedded tokens and within layers.
        causal_attn: whether a step sees only what lies before it.
        n_cond_layers: layers of self-attention over the memory; 0: an MLP for each of its tokens.

    Raises:
        InputError: a value is out of range; the message names it.
    """

    n_layer: int = 8
    n_head: int = 4
    n_emb: int = 256
    p_drop_emb: float = 0.0
    p_drop_attn: float = 0.01
    causal_attn: bool = True
    n_cond_layers: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("n_layer", 1, 256),
            ("n_head", 1, 1024),
            ("n_emb", 4, 2**14),
            ("n_cond_layers", 0, 256),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise refused(name, value, f"a whole number from {least} to {most}")
        for name in ("p_drop_emb", "p_drop_attn"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise refused(name, value, "a number from 0 to under 1")
        if not isinstance(self.causal_attn, bool):
            raise refused("causal_attn", self.causal_attn, "true or false")
        if self.n_emb % 2:
            raise refused("n_emb", self.n_emb, "even: sines and cosines")
        if self.n_emb % self.n_head:
            raise refused("n_emb", self.n_emb, f"a multiple of n_head={self.n_head}")


def refused(name: str, value: Any, expected: str) -> InputError:
    """An error about an option."""
    return InputError(f"network_options.{name}={value!r:.40} must be {expected}")


def dropped(dropout: nn.Module, x: Tensor) -> Tensor:
    """``dropout(x)`` in training, x itself otherwise: a captured program has no random calls."""
    return dropout(x) if dropout.training else x


def attended(
    attention: nn.MultiheadAttention, queries: Tensor, keys_values: Tensor, mask: Tensor | None
) -> Tensor:
    """``W_o softmax(q k^T / sqrt(d) + mask) v``, by head (Vaswani et al. 2017, section 3.2).

    Args:
        queries: projected, ``[rows, T, W]``.
        keys_values: projected, side by side, ``[rows, S, 2 W]``.
        mask: ``[T, S]``; None: all is seen.

    Returns:
        ``[rows, T, W]``.
    """
    heads, size = attention.num_heads, attention.head_dim
    projected = queries, *keys_values.chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, size)).transpose(1, 2) for x in projected)
    scores = (q * size**-0.5) @ k.transpose(2, 3)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    if attention.training and attention.dropout:
        weights = nn.functional.dropout(weights, attention.dropout)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


def projection(attention: nn.MultiheadAttention, x: Tensor, part: slice = slice(None)) -> Tensor:
    """Queries, keys and values of tokens ``[…, W]``, side by side: ``[…, 3 W]``, or a part of those."""
    return nn.functional.linear(x, attention.in_proj_weight[part], attention.in_proj_bias[part])


def self_attended(attention: nn.MultiheadAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention of tokens ``[rows, T, W]``."""
    width = x.shape[-1]
    queries, keys_values = projection(attention, x).split((width, 2 * width), dim=-1)
    return attended(attention, queries, keys_values, mask)


def mlp_output(layer: Any, x: Tensor) -> Tensor:
    """Of a layer's MLP."""
    return layer.linear2(dropped(layer.dropout, nn.functional.gelu(layer.linear1(x))))


class TransformerForDiffusion(nn.Module):
    """Predicts the denoising target of an action sequence from its noisy version.

    Keys and values of the memory's tokens depend on the timestep alone, or on the observation alone, unless
    ``n_cond_layers`` mix them.  ``time_features`` and ``condition_features`` give them for all layers side by
    side, ``combine`` puts them one after the other, and ``trunk`` is what is left.  With ``n_cond_layers``
    the features are embedded tokens, and the trunk begins with the encoder.

    Args:
        input_dim: action dimension A.
        horizon: steps T of a plan.
        n_obs_steps: observations To of a window.
        cond_dim: size O of an observation.
        options: the other sizes.
    """

    mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self,
        input_dim: int,
        horizon: int,
        n_obs_steps: int,
        cond_dim: int,
        options: TransformerOptions | None = None,
    ) -> None:
        super().__init__()
        self.options = options = options or TransformerOptions()
        self.input_dim, self.global_cond_dim = input_dim, n_obs_steps * cond_dim
        self.n_obs_steps, width = n_obs_steps, options.n_emb
        self.input_emb = nn.Linear(input_dim, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, horizon, width))
        self.drop = nn.Dropout(options.p_drop_emb)
        self.time_emb = SinusoidalPosEmb(width)
        self.cond_obs_emb = nn.Linear(cond_dim, width)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, 1 + n_obs_steps, width))
        layer: dict[str, Any] = {
            "d_model": width,
            "nhead": options.n_head,
            "dim_feedforward": 4 * width,
            "dropout": options.p_drop_attn,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder: nn.Module
        if options.n_cond_layers:
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer), options.n_cond_layers, enable_nested_tensor=False
            )
        else:
            self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), options.n_layer)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, input_dim)
        masks = causal_masks(horizon, 1 + n_obs_steps) if options.causal_attn else (None, None)
        for name, mask in zip(("mask", "memory_mask"), masks, strict=True):
            self.register_buffer(name, mask, persistent=False)
        self.register_load_state_dict_pre_hook(without_derived)
        self.apply(draw_weights)

    def extra_repr(self) -> str:
        return f"{self.options}"

    @property
    def undecayed(self) -> set[str]:
        """Names of the parameters that training shouldn't decay: biases, norms and positions."""
        flat = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        return flat | {"pos_emb", "cond_pos_emb"}

    @property
    def trunk_weights(self) -> int:
        """How many numbers of the weights the trunk reads."""
        width, n_layer = self.options.n_emb, self.options.n_layer
        parts: list[nn.Module] = [self.input_emb, self.decoder, self.ln_f, self.head]
        hoisted = 2 * width * (width + 1) * n_layer  # keys and values of the memory
        if self.options.n_cond_layers:
            parts, hoisted = [*parts, self.encoder], 0
        return sum(p.numel() for part in parts for p in part.parameters()) + self.pos_emb.numel() - hoisted

    @property
    def _layers(self) -> list[nn.TransformerDecoderLayer]:
        return cast(list[nn.TransformerDecoderLayer], list(self.decoder.layers))

    def time_features(self, timestep: Tensor) -> Tensor:
        """The memory's first token for timesteps ``[n]``: ``[n, 1, F]``."""
        return self._features(self.time_emb(timestep)[:, None], self.cond_pos_emb[:, :1])

    def condition_features(self, global_cond: Tensor) -> Tensor:
        """The memory's other tokens for conditions ``[batch, G]``: ``[batch, To, F]``."""
        observations = global_cond.unflatten(1, (self.n_obs_steps, -1))
        return self._features(self.cond_obs_emb(observations), self.cond_pos_emb[:, 1:])

    def combine(self, time: Tensor, condition: Tensor) -> Tensor:
        """The memory ``[rows, 1 + To, F]``."""
        return torch.cat((time, condition), dim=1)

    def trunk(self, sample: Tensor, features: Tensor) -> Tensor:
        """``sample`` ``[rows, T, A]`` and ``features`` ``[rows, 1 + To, F]`` to ``[rows, T, A]``."""
        if self.options.n_cond_layers:
            features = self._keys_values(self._encoded(features))
        x = dropped(self.drop, self.input_emb(sample) + self.pos_emb)
        all_keys_values = features.chunk(self.options.n_layer, dim=-1)
        for layer, keys_values in zip(self._layers, all_keys_values, strict=True):
            x = x + dropped(layer.dropout1, self_attended(layer.self_attn, layer.norm1(x), self.mask))
            queries = projection(layer.multihead_attn, layer.norm2(x), slice(None, self.options.n_emb))
            mixed = attended(layer.multihead_attn, queries, keys_values, self.memory_mask)
            x = x + dropped(layer.dropout2, mixed)
            x = x + dropped(layer.dropout3, mlp_output(layer, layer.norm3(x)))
        return self.head(self.ln_f(x))

    def forward(self, sample: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        """One network call.

        Args:
            sample: ``[batch, T, A]``.
            timestep: ``[batch]``, index into the noise schedule.
            global_cond: ``[batch, G]``, the flattened window ``[batch, To, O]``.

        Returns:
            ``[batch, T, A]``: epsilon, x0 or v, whatever it was trained for.
        """
        features = self.combine(self.time_features(timestep), self.condition_features(global_cond))
        return self.trunk(sample, features)

    def _features(self, tokens: Tensor, positions: Tensor) -> Tensor:
        tokens = dropped(self.drop, tokens + positions)
        return tokens if self.options.n_cond_layers else self._keys_values(self.encoder(tokens))

    def _encoded(self, x: Tensor) -> Tensor:
        """The memory of embedded tokens ``[rows, S, W]``, by ``n_cond_layers`` of self-attention."""
        for layer in cast(Any, self.encoder).layers:
            x = x + dropped(layer.dropout1, self_attended(layer.self_attn, layer.norm1(x), None))
            x = x + dropped(layer.dropout2, mlp_output(layer, layer.norm2(x)))
        return x

    def _keys_values(self, memory: Tensor) -> Tensor:
        """All layers' keys and values of a memory ``[…, S, W]``: ``[…, S, F]``, ``F = 2 W n_layer``."""
        part = slice(self.options.n_emb, None)
        return torch.cat([projection(layer.multihead_attn, memory, part) for layer in self._layers], dim=-1)


def causal_masks(horizon: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    """What attention scores are added to: 0, or minus infinity where a step must not look.  ``[T, T]`` of the
    steps, ``[T, S]`` of the memory, whose first token is the timestep's.

    On the CPU wherever the rest is made: no state dict has them, so the meta device would lose them.
    """
    step, token = torch.arange(horizon, device="cpu")[:, None], torch.arange(n_tokens, device="cpu")
    hidden = step < step.T, step < token - 1
    own, memory = (torch.zeros(each.shape, device="cpu").masked_fill(each, -math.inf) for each in hidden)
    return own, memory


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """diffusion_policy's initial weights: normal with a deviation of 0.02, biases 0."""
    drawn: list[Any] = []
    if isinstance(module, nn.Linear):
        drawn, zero = [module.weight], module.bias
    elif isinstance(module, nn.MultiheadAttention):
        drawn, zero = [module.in_proj_weight], module.in_proj_bias
    elif isinstance(module, TransformerForDiffusion):
        drawn, zero = [module.pos_emb, module.cond_pos_emb], None
    else:
        return
    for weight in drawn:
        weight.normal_(0.0, 0.02)
    if zero is not None:
        zero.zero_()


def without_derived(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leaves out of a state dict what isn't learnt (before it is loaded)."""
    for name in DERIVED:
        state_dict.pop(prefix + name, None)

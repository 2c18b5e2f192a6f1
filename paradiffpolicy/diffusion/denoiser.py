r"""One convention for every network: ``x0_hat = D(x_t, t)``.

A network predicts epsilon, the sample, v, the score, or a flow's velocity; which one, and the bounds put
on the result, is known here and nowhere else.

===========  ============================================  ==========================
prediction   target for ``x_t = alpha x_0 + sigma eps``     x0_hat from the output o
===========  ============================================  ==========================
epsilon      ``eps``                                       ``(x_t - sigma o) / alpha``
sample       ``x_0``                                       ``o``
v            ``alpha eps - sigma x_0`` (Salimans & Ho 22)  ``(alpha x_t - sigma o) / (alpha^2 + sigma^2)``
score        ``-eps / sigma`` (Song et al. 2021)           ``(x_t + sigma^2 o) / alpha``
velocity     ``eps - x_0`` (Lipman et al. 2023)            ``(x_t - sigma o) / (alpha + sigma)``
===========  ============================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InputError, is_number, require_positive
from ..registry import Registry
from .schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t [batch, T, A], t [batch], condition [batch, G]) -> [batch, T, A]``; t, which may be fractional, is
the schedule's ``network_time``."""

BoundDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x [rows, T, A], t [rows], element [rows] int64) -> x0_hat [rows, T, A]``.

A row is one node of one batch element; ``element`` says which, to find its condition.  ``t`` may be
fractional and has x's dtype.  What is written ``T, A`` here may be any shape, an image's too.
"""

Threshold = Callable[[Tensor], Tensor]
"""Bounds an x0_hat ``[batch, T, A]``, each row by itself."""


def unbounded(x0: Tensor) -> Tensor:
    """No threshold."""
    return x0


def _bounded(x0: Tensor, bound: Tensor | float) -> Tensor:
    # Where x0 isn't finite, the sum is NaN, so that the plan is refused: OpenVINO's bounds make a number of
    # NaN, and all make one of infinity.
    return x0.clamp(-bound, bound) + (x0 - x0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Clip:
    """``|x0_hat| <= bound``, in normalised units (diffusion_policy: 1); NaN where it isn't finite."""

    bound: float = 1.0

    def __post_init__(self) -> None:
        require_positive(clip=self.bound)

    def __call__(self, x0: Tensor) -> Tensor:
        return _bounded(x0, self.bound)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clips each row at a quantile of its own absolute values, but at least at 1 and at most at
    ``maximum``, and scales it back to 1 (Saharia et al. 2022, Imagen, section 2.3).

    Keeps strong guidance from saturating most of the sample.
    """

    ratio: float = 0.995
    maximum: float = float("inf")

    def __post_init__(self) -> None:
        if not is_number(self.ratio) or not 0 < self.ratio <= 1:
            raise InputError(f"dynamic threshold ratio={self.ratio!r:.40} must be over 0, at most 1")

    def __call__(self, x0: Tensor) -> Tensor:
        quantile = torch.quantile(x0.flatten(1).abs(), self.ratio, dim=1)
        bound = per_row(quantile.clamp(1.0, self.maximum), x0)
        return _bounded(x0, bound) / bound


@dataclass(frozen=True)
class Prediction:
    """Relates a network's output to x0: how a training target is made, and how x0 comes back."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """``(x_0, eps, alpha, sigma) -> target``."""
    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """``(x_t, output, alpha, sigma) -> x_0``."""
    weight: Callable[[Tensor], Tensor] = torch.ones_like
    """Of the squared error in training, from sigma."""


V_PREDICTION = Prediction(
    target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    to_x0=lambda x, output, alpha, sigma: (alpha * x - sigma * output) / (alpha**2 + sigma**2),
)

PREDICTIONS: Registry[Prediction] = Registry(
    "prediction type",
    {
        "epsilon": Prediction(
            target=lambda x0, eps, alpha, sigma: eps,
            to_x0=lambda x, output, alpha, sigma: (x - sigma * output) / alpha,
        ),
        "sample": Prediction(
            target=lambda x0, eps, alpha, sigma: x0,
            to_x0=lambda x, output, alpha, sigma: output,
        ),
        "v": V_PREDICTION,
        "v_prediction": V_PREDICTION,
        "score": Prediction(
            target=lambda x0, eps, alpha, sigma: -eps / sigma,
            to_x0=lambda x, output, alpha, sigma: (x + sigma**2 * output) / alpha,
            weight=torch.square,  # then every timestep counts alike
        ),
        "velocity": Prediction(
            target=lambda x0, eps, alpha, sigma: eps - x0,
            to_x0=lambda x, output, alpha, sigma: (x - sigma * output) / (alpha + sigma),
        ),
    },
)
"""Every prediction by name; ``v_prediction`` is diffusers' name of v."""


def prediction_of(prediction: str | Prediction) -> Prediction:
    """A prediction by its name, or itself.  Raises ``InputError`` for an unknown name."""
    return prediction if isinstance(prediction, Prediction) else PREDICTIONS.named(prediction)


def check_prediction(prediction: str | Prediction, schedule: NoiseSchedule) -> None:
    """Makes sure that x_0 can be told from what a network predicts at every timestep.

    Raises:
        InputError: the prediction is unknown, or divides by the signal's share where there is none.
    """
    noisiest = torch.tensor([schedule.n_train_steps - 1], dtype=torch.float64)
    alpha, sigma, one = schedule.alpha(noisiest), schedule.sigma(noisiest), torch.ones_like(noisiest)
    if not prediction_of(prediction).to_x0(one, one, alpha, sigma).isfinite().all():
        raise InputError(
            f"{prediction=!r:.40} leaves x_0 open where there is nothing but noise, as at this schedule's "
            "noisiest timestep: velocity, v or sample"
        )


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """``[batch]`` to ``[batch, 1, …, 1]`` in ``like``'s dtype, to multiply ``[batch, T, A]``."""
    return values.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


Trunk = Callable[[Tensor, Tensor], Tensor]
"""``(x_t [rows, T, A], features [rows, …]) -> [rows, T, A]``."""


@runtime_checkable
class SplitNetwork(Protocol):
    """A network whose timestep and condition can each be prepared without the sample: ``network(x, t, c) =
    trunk(x, combine(time_features(t), condition_features(c)))``.

    Features are computed once per node of a table, and once per plan; what combines them runs in every
    network call.
    """

    def time_features(self, timestep: Tensor) -> Tensor:
        """``[n]`` to ``[n, …]``."""
        ...

    def condition_features(self, global_cond: Tensor) -> Tensor:
        """``[batch, G]`` to ``[batch, …]``."""
        ...

    def combine(self, time: Tensor, condition: Tensor) -> Tensor:
        """Both features of as many rows, ``[rows, …]`` each, to what the trunk takes, ``[rows, …]``."""
        ...

    def trunk(self, sample: Tensor, features: Tensor) -> Tensor:
        """See ``Trunk``."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network as ``x0_hat = D(x_t, t, condition)``.

    Attributes:
        network: the conditional network.
        schedule: the schedule that it was trained on.
        prediction: a name in ``PREDICTIONS``, or a ``Prediction``.
        threshold: bounds x0_hat.
        keeps_epsilon: for DDIM on a list of timesteps: x0_hat is put off its bound by as much as makes the
            step to the next timestep one with the bounded x0_hat and the network's own epsilon
            (``use_clipped_model_output=False`` of diffusers).
    """

    network: Network
    schedule: NoiseSchedule
    prediction: str | Prediction = "epsilon"
    threshold: Threshold = Clip()
    keeps_epsilon: bool = False

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.schedule)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``t`` ``[batch]``."""
        return self.schedule.alpha(t), self.schedule.sigma(t)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is called with at ``t`` ``[batch]``."""
        return self.schedule.network_time(t)

    def observe(self, condition: Tensor) -> Tensor:
        """What the other methods take for conditions ``[batch, G]``: here the conditions themselves."""
        return condition

    def raw(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x0_hat without the threshold: what guidance combines."""
        alpha, sigma = (per_row(values, x) for values in self.levels(t))
        output = self.network(x, self.network_time(t), condition)
        return prediction_of(self.prediction).to_x0(x, output, alpha, sigma)

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``x`` ``[batch, T, A]``, ``t`` ``[batch]`` in x's dtype, ``condition`` ``[batch, G]``."""
        raw = self.raw(x, t, condition)
        bounded = self.threshold(raw)
        return self.with_epsilon(raw, bounded, t) if self.keeps_epsilon else bounded

    def with_epsilon(self, raw: Tensor, bounded: Tensor, t: Tensor) -> Tensor:
        """The x0_hat in place of ``bounded`` that keeps the network's epsilon."""
        raise InputError("keeps_epsilon is of DDIM's steps on a list of timesteps: another driver")

    def bind(self, condition: Tensor) -> BoundDenoise:
        """Fixes ``condition`` ``[batch, G]`` for one plan."""
        return lambda x, t, element: self(x, t, condition.index_select(0, element))

    def at(self, timesteps: Tensor, like: Tensor, trunk: Trunk | None = None) -> NodeDenoiser:
        """The denoiser at ``timesteps`` ``[N]`` float64 alone, with what they decide computed
        beforehand, in ``like``'s precision and on its device.

        Args:
            trunk: another form of the network's trunk, for a ``SplitNetwork``.
        """
        network, time = self.network, self.schedule.network_time(timesteps).to(like)
        alpha, sigma = (values.to(like) for values in self.levels(timesteps))
        known: Any = {name: getattr(self, name) for name in ("schedule", "prediction", "threshold")}
        if self.keeps_epsilon:
            known |= {"keeps_epsilon": True, "excess": self._excess(timesteps).to(like)}
        if not isinstance(network, SplitNetwork):

            def whole(x: Tensor, node: Tensor, condition: Tensor) -> Tensor:
                return self.network(x, time.index_select(0, node), condition)

            return NodeDenoiser(whole, alpha_at=alpha, sigma_at=sigma, **known)
        time, run = network.time_features(time), trunk or network.trunk

        def split(x: Tensor, node: Tensor, condition: Tensor) -> Tensor:
            return run(x, network.combine(time.index_select(0, node), condition))

        return NodeDenoiser(
            split, alpha_at=alpha, sigma_at=sigma, features=network.condition_features, **known
        )

    def _excess(self, timesteps: Tensor) -> Tensor:
        r"""``[N]``, w in ``D = bounded + w (bounded - raw)``, from DDIM's step with both:

        ``alpha' bounded + sigma' eps = alpha' D + sigma' (x - alpha D) / sigma``, where ``x = alpha raw +
        sigma eps``; hence ``w = k / (alpha' - k)`` with ``k = alpha sigma' / sigma``.
        """
        alpha, sigma = self.levels(timesteps)
        one, zero = torch.ones_like(alpha[:1]), torch.zeros_like(alpha[:1])
        next_alpha, next_sigma = torch.cat((alpha[1:], one)), torch.cat((sigma[1:], zero))
        k = alpha * next_sigma / sigma
        return k / (next_alpha - k)


@dataclass(frozen=True, eq=False)
class NodeDenoiser(Denoiser):
    """A denoiser at a list of timesteps, its nodes: takes nodes for timesteps, and what ``observe`` makes
    of conditions, once per plan, for conditions.

    Attributes:
        alpha_at, sigma_at: ``[N]``, of the nodes.
        features: conditions ``[batch, G]`` to what the network takes, ``[batch, …]``; None: themselves.
        excess: ``[N]``, how far beyond its bound x0_hat goes to keep epsilon, in what the bound cut off.
    """

    alpha_at: Tensor = field(kw_only=True)
    sigma_at: Tensor = field(kw_only=True)
    features: Callable[[Tensor], Tensor] | None = None
    excess: Tensor | None = None

    def with_epsilon(self, raw: Tensor, bounded: Tensor, t: Tensor) -> Tensor:
        assert self.excess is not None
        return bounded + per_row(self.excess.index_select(0, t), raw) * (bounded - raw)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha_at.index_select(0, t), self.sigma_at.index_select(0, t)

    def network_time(self, t: Tensor) -> Tensor:
        return t  # a node, whose time the network knows

    def observe(self, condition: Tensor) -> Tensor:
        return condition if self.features is None else self.features(condition)


def denoising_loss(
    network: Network,
    schedule: NoiseSchedule,
    prediction: str | Prediction,
    x0: Tensor,
    condition: Tensor,
    t: Tensor,
    eps: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error to the prediction target (Ho et al. 2020, equation 14), weighted per target.

    Args:
        x0, eps: clean actions and the noise, ``[batch, T, A]``.
        condition: ``[batch, G]``.
        t: ``[batch]`` timesteps.
        weight: ``[batch, T]``, of each step's error, 1 on average; steps of weight 0 are given without noise
            (``diffusion.prefix``); None: all weigh 1.
    """
    alpha, sigma = per_row(schedule.alpha(t), x0), per_row(schedule.sigma(t), x0)
    kind = prediction_of(prediction)
    target = kind.target(x0, eps, alpha, sigma)
    noisy = alpha * x0 + sigma * eps
    if weight is not None:
        noisy = torch.where(weight.unsqueeze(-1) > 0, noisy, x0)
    output = network(noisy, schedule.network_time(t).to(x0.dtype), condition)
    errors = kind.weight(sigma) * (output.float() - target) ** 2
    return (errors if weight is None else weight.unsqueeze(-1) * errors).mean()

r"""ParaDiGMS: a window of nodes in every network call (Shih et al. 2023).

Both forms iterate towards the one solution of the table's equations.  A window of W nodes starts at
the first node not yet solved; an iteration calls the network on all of them at once, and the window
slides past the nodes whose input moved less than the tolerance:

    mean (x_i_new - x_i)^2  <=  tolerance^2  variance_i            (algorithm 1 there)

Each batch element has its own window, held in a tensor on the device.  A window's first node has a
solved input, so every iteration solves at least one node: with tolerance to 0 the result is the
sequential one, in at most N iterations.

A robot needs the plan, not every node.  With ``plan_tolerance`` a batch element is done as
soon as the part of its sample that will be executed moves less than that from iteration to iteration.

``Picard`` iterates on the denoiser's outputs, ``D <- D(drift + B D)``.  B carries everything linear
at once, so errors are left only where the network is nonlinear.  ``PicardPublished`` is the paper's
form, which sums the steps' increments, and needs about twice the iterations at equal error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import LARGEST, InputError, is_whole, require_count, require_positive
from ..types import Noise, Solution
from .driver import (
    Driver,
    Evaluate,
    IterativeDriver,
    Linear,
    NodeDenoise,
    Solve,
    State,
    broadcast,
    combined,
    evaluate_active,
    leading,
    put,
    take,
    zero_counts,
)
from .tableau import Tableau

AUTO = "auto"
"""A window that is chosen for a machine (``calibration``)."""

UNCALIBRATED = 20
"""Nodes of a window that is ``auto``, until it is chosen."""

RANGE = 2.0
"""Of a normalised action, from -1 to 1."""


@dataclass(frozen=True)
class Windowed(IterativeDriver):
    """Settings of a windowed driver.

    Attributes:
        window: W, nodes per iteration and batch element; ``auto``: ``calibration.calibrated`` chooses it.
        evaluate: how the network is called on a window.
    """

    window: int | str = AUTO
    evaluate: Evaluate = field(default=evaluate_active, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.window != AUTO:
            require_count(window=self.window)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """The window in nodes."""
        return UNCALIBRATED if self.window == AUTO else int(self.window)


class WindowedSolve(Solve):
    """Every iteration calls the network on windows of nodes, one per batch element, whose first nodes are
    ``state["offset"]`` ``[batch]``."""

    count = None

    def __init__(self, driver: Windowed, tableau: Tableau, like: Tensor, warm: bool) -> None:
        self.n = self.limit = tableau.n_nodes
        self.linear, self.warm, self.evaluate = Linear(tableau, like), warm, driver.evaluate
        self.size = min(driver.width, self.n)
        self.ahead = torch.arange(self.size, device=like.device)[:, None]
        self.nodes = torch.arange(self.n + 2, device=like.device)[:, None]

    def windows(self, like: Tensor) -> State:
        """Windows at the first node, for ``like`` ``[batch, …]``."""
        return {name: zero_counts(like) for name in ("offset", "iterations", "nfe")}

    def index(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """The windows' nodes ``[W, batch]``, with n for what hangs over the end; the same with N - 1 for
        it; and which of them exist."""
        index = state["offset"] + self.ahead
        return index.clamp(max=self.n), index.clamp(max=self.n - 1), index < self.n

    def filled(self, values: Tensor, index: Tensor, new: Tensor) -> Tensor:
        """``values`` ``[…, batch, T, A]`` with a window's ``new`` ones at ``index``; on a cold start, nodes
        that no window has reached yet take those of the farthest node that one has."""
        values = put(values, index, new)
        if self.warm:
            return values
        unreached = self.nodes[: len(values)] >= index[0] + self.size
        return torch.where(broadcast(unreached, values), new[-1], values)

    def moved_on(self, state: State, active: Tensor, solved: Tensor) -> State:
        """Windows after an iteration that solved so many of their nodes, ``[batch]``."""
        return {
            "offset": (state["offset"] + solved).clamp(max=self.n),
            "iterations": state["iterations"] + active[0],
            "nfe": state["nfe"] + active.sum(dim=0),
        }

    def standing(self, index: Tensor, moved: Tensor, limits: Tensor) -> Tensor:
        """Of every window, how many nodes are solved ``[batch]``: the first, whose input was solved, and
        those after it whose input stood still, up to the first that moved.

        Args:
            moved: ``[W, batch]``, the mean square.
            limits: ``[N + 1]``, of the nodes.
        """
        still = moved <= limits.index_select(0, index.flatten()).view(index.shape)
        return leading(still | (self.ahead == 0))

    def done(self, state: State) -> Tensor:
        return (state["offset"] >= self.n).all()


@dataclass(frozen=True)
class _Tolerant(Windowed):
    """A windowed driver with a stopping rule.

    Attributes:
        tolerance: of a node, in standard deviations of DDPM's reverse step.
    """

    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(tolerance=self.tolerance)

    def limits(self, variances: Tensor, like: Tensor) -> Tensor:
        """How far nodes may move, in the mean square, if they are measured in these variances."""
        return (self.tolerance**2 * variances).to(like)


def no_finer(driver: Driver, tolerance: float) -> Driver:
    """The driver with a tolerance of at least so much; one without a tolerance as it is."""
    if isinstance(driver, _Tolerant) and driver.tolerance < tolerance:
        return replace(driver, tolerance=tolerance)
    return driver


def mean_square(x: Tensor) -> Tensor:
    """``[W, batch, T, A]`` to ``[W, batch]``."""
    return x.flatten(2).square().mean(dim=-1)


@dataclass(frozen=True)
class Picard(_Tolerant):
    """Iterates ``D <- D(drift + B D)`` in windows to its fixed point.

    Nodes that no window has reached yet take the x0_hat of the farthest node that one has.

    Attributes:
        plan_tolerance: of the plan, as a share of the action range; None: only nodes count.
        executed: the steps of the sample that ``plan_tolerance`` is about.
    """

    plan_tolerance: float | None = None
    executed: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan_tolerance is not None:
            require_positive(plan_tolerance=self.plan_tolerance)
        ends = (self.executed.start, self.executed.stop) if isinstance(self.executed, slice) else ("",)
        if not all(end is None or is_whole(end) for end in ends) or not range(LARGEST)[self.executed]:
            raise InputError(f"executed={self.executed!r:.40} must be a slice of steps that isn't empty")

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        return PicardSolve(self, tableau, like, warm)


class PicardSolve(WindowedSolve):
    """The state holds all x0_hats."""

    def __init__(self, driver: Picard, tableau: Tableau, like: Tensor, warm: bool) -> None:
        super().__init__(driver, tableau, like, warm)
        # A node's unit is the noise of the step that leads to it.  (The paper takes the step that
        # leaves it; the last one has no noise, which costs an iteration for the last node alone.)
        self.limits = driver.limits(torch.cat((tableau.variance[:1], tableau.variance)), like)
        self.plan_limit = None if driver.plan_tolerance is None else driver.plan_tolerance * RANGE
        self.executed = driver.executed

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        drift = self.linear.drift(noise)
        # Row N takes what a window that hangs over the end would write; no node reads it.
        x0_hats = torch.zeros_like(drift) if guess is None else torch.cat((guess, guess[:1]))
        state = {"drift": drift, "x0_hats": x0_hats, **self.windows(noise.x_T)}
        if self.plan_limit is not None:
            # The plan of the iteration before: nothing is near NaN.
            state["plan"] = torch.full_like(noise.x_T[:, self.executed], torch.nan)
        return state

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        drift, x0_hats = state["drift"], state["x0_hats"]
        index, inside, active = self.index(state)
        x = self.linear.nodes(index, drift, x0_hats[: self.n])
        new = self.filled(x0_hats, index, self.evaluate(denoise, x, inside, active))
        moved = self._moved(index, drift, new, x)
        new, moved, kept = self.improved(state, index, active, x, new, moved)
        state = {**state, **kept, "x0_hats": new}
        reached = state["offset"] + self.size >= self.n
        state |= self.moved_on(state, active, self.standing(index, moved, self.limits))
        return self.finished(state, reached)

    def improved(
        self, state: State, index: Tensor, active: Tensor, x: Tensor, new: Tensor, moved: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """A chance to do better than Picard's update.

        Args:
            state: before the iteration.
            x: ``[W, batch, T, A]``, the windows' inputs.
            new: ``[N + 1, batch, T, A]``, all x0_hats after it.
            moved: ``[W, batch]``, the mean square by which the inputs moved.

        Returns:
            ``new`` and ``moved`` anew, and what to remember in the state.
        """
        return new, moved, {}

    def _moved(self, index: Tensor, drift: Tensor, x0_hats: Tensor, x: Tensor) -> Tensor:
        """``[W, batch]``: by how much the windows' inputs differ from ``x``, in the mean square."""
        return mean_square(self.linear.nodes(index, drift, x0_hats[: self.n]) - x)

    def finished(self, state: State, reached: Tensor) -> State:
        """Ends the iteration of batch elements whose plan stood still in one that ``reached`` the end."""
        if self.plan_limit is None:
            return state
        plan = self.linear.sample(state["drift"], state["x0_hats"][: self.n])[:, self.executed]
        still = (plan - state["plan"]).abs().flatten(1).amax(dim=1) <= self.plan_limit
        offset = torch.where(reached & still, self.n, state["offset"])
        return {**state, "plan": plan, "offset": offset}

    def finish(self, noise: Noise, state: State) -> Solution:
        x0_hats = state["x0_hats"][: self.n]
        sample = self.linear.sample(state["drift"], x0_hats)
        return Solution(sample, x0_hats, noise, state["iterations"], state["nfe"])


@dataclass(frozen=True)
class PicardPublished(_Tolerant):
    """Iterates the paper's algorithm, ``x_{i+1} <- x_o + sum_{k=o..i} (step(x_k) - x_k)``, o the window's
    first node; nodes that no window has reached yet take the farthest one's value.

    Reproduces the paper; ignores ``guess``.
    """

    def on(self, tableau: Tableau, like: Tensor, warm: bool) -> Solve:
        return PicardPublishedSolve(self, tableau, like, warm=False)


class PicardPublishedSolve(WindowedSolve):
    """The state holds all inputs."""

    def __init__(self, driver: PicardPublished, tableau: Tableau, like: Tensor, warm: bool) -> None:
        super().__init__(driver, tableau, like, warm)
        self.limits = driver.limits(torch.cat((tableau.variance, tableau.variance.new_zeros(1))), like)
        self.a, self.q, self.S, self.R = (part.to(like) for part in tableau.step_form)

    def init(self, noise: Noise, guess: Tensor | None) -> State:
        x_T, z = noise.x_T, noise.z
        q = self.q.view(-1, *[1] * x_T.ndim)
        # Row N of x0_hats and row N + 1 of x take what hangs over the end; no node reads them.
        return {
            "given": (self.R @ z.reshape(self.n, -1)).view_as(z) + q * x_T,
            "x0_hats": x_T.new_zeros(self.n + 1, *x_T.shape),
            "x": x_T.expand(self.n + 2, *x_T.shape).clone(),
            **self.windows(x_T),
        }

    def iterate(self, denoise: NodeDenoise, state: State) -> State:
        index, inside, active = self.index(state)
        old = take(state["x"], index)
        outputs = self.evaluate(denoise, old, inside, active)
        x0_hats = put(state["x0_hats"], index, outputs)
        a = broadcast(self.a.index_select(0, inside.flatten()).view(inside.shape), old)
        step = a * old + take(state["given"], inside) + combined(self.S, inside, x0_hats[: self.n])
        new = old[0] + (step - old).cumsum(dim=0)
        moved = mean_square(torch.cat((old[:1], new[:-1])) - old)
        return {
            **state,
            "x0_hats": x0_hats,
            "x": self.filled(state["x"], index + 1, new),
            **self.moved_on(state, active, self.standing(index, moved, self.limits)),
        }

    def finish(self, noise: Noise, state: State) -> Solution:
        x0_hats = state["x0_hats"][: self.n]
        return Solution(state["x"][self.n], x0_hats, noise, state["iterations"], state["nfe"])

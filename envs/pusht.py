"""PushT: a round pusher moves a T-shaped block onto its target (Florence et al. 2021; Chi et al. 2023).

Lengths are in pixels of a 512 x 512 world with y pointing down, angles in radians, times in
seconds.  Physics, control, reward and resets are those of diffusion_policy's environment, on
pymunk 7; replaying its human demonstrations reproduces them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pygame
import pymunk
import shapely
from gymnasium import spaces
from numpy.typing import NDArray

WORLD = 512
PHYSICS_HZ = 100
CONTROL_HZ = 10
K_P, K_V = 100.0, 20.0
SUCCESS_COVERAGE = 0.95
GOAL_POSE = (256.0, 256.0, math.pi / 4)
PUSHER_RADIUS = 15.0
WALLS = ((5, 506), (5, 5), (506, 5), (506, 506))
CAMERA_SIZE = 96

# In the block's frame; both parts are 30 px thick, the bar 120 wide, the stem 90 long.
BAR = ((-60.0, 30.0), (60.0, 30.0), (60.0, 0.0), (-60.0, 0.0))
STEM = ((-15.0, 30.0), (-15.0, 120.0), (15.0, 120.0), (15.0, 30.0))

KEYPOINTS = np.array(
    [
        (9.27, 90.04),
        (-60.98, -1.19),
        (60.91, -1.39),
        (-0.27, 25.54),
        (-14.06, 122.82),
        (39.00, 32.86),
        (-39.97, 32.73),
        (-16.82, 62.86),
        (23.54, -1.70),
    ]
)
"""The nine recorded keypoints in the block's frame, as the human demonstrations have them (least
squares over the data, p99 residual 0.02 px).  They are near the T's corners, not on them."""

CORNERS = np.array([BAR[i] for i in (3, 2, 1, 0)] + [STEM[i] for i in (0, 3, 2, 1)])
"""The corners of both parts in the block's frame, in the order of gym-pusht's ``environment_state``."""

T_AREA = shapely.union_all([shapely.Polygon(BAR), shapely.Polygon(STEM)])

COLORS = {
    "background": (255, 255, 255),
    "wall": (211, 211, 211),
    "goal": (144, 238, 144),
    "block": (119, 136, 153),
    "pusher": (65, 105, 225),
    "action": (220, 60, 60),
}


def to_world(points: NDArray[np.float64], x: float, y: float, angle: float) -> NDArray[np.float64]:
    """``[n, 2]`` in a body's frame to the world."""
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) + (x, y)


def placed_t(x: float, y: float, angle: float) -> shapely.Geometry:
    """The T's outline at a pose."""
    return shapely.transform(T_AREA, lambda points: to_world(points, x, y, angle))


def lighter(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """A color of a shape's inside, of its outline's."""
    r, g, b = (min(255, 6 * part // 5) for part in color)
    return r, g, b


def thick_line(
    surface: pygame.Surface, color: tuple[int, int, int], a: NDArray[Any], b: NDArray[Any]
) -> None:
    """Draws a line 4 px wide, with round ends, as the human demonstrations' pictures have them."""
    along = (b - a) / np.hypot(*(b - a))
    aside = 2 * np.array([along[1], -along[0]])
    pygame.draw.line(surface, color, a.tolist(), b.tolist(), 4)
    pygame.draw.polygon(surface, color, [a + aside, a - aside, b - aside, b + aside])
    for end in (a, b):
        pygame.draw.circle(surface, color, end.tolist(), 2)


class PushTEnv(gymnasium.Env[Any, NDArray[np.float64]]):
    """Push the T.

    Action: ``[2]``, the pusher's goal, 0 … 512 px, which a PD controller pursues.

    Observation, by ``obs_type``:
        ``state``: ``[5]``, pusher x, y, block x, y, block angle in [0, 2 pi).
        ``keypoints``: ``[20]``, nine keypoints of the block (x, y each), then the pusher's x, y.
        ``corners``: ``[18]``, the pusher's x, y, then the eight corners of the block's parts: gym-pusht's
            ``agent_pos`` and ``environment_state``, on which LeRobot's policies are trained.
        ``image``: dict of ``image`` ``[96, 96, 3]`` uint8 RGB, drawn as the human demonstrations' pictures
            are, and ``agent_pos`` ``[2]``.

    Reward: the share of the target that the block covers, over 0.95, at most 1; the episode
    terminates when the share is over 0.95, unless ``terminates`` is False.

    ``control_hz`` is the rate of actions; the physics don't depend on it.

    ``reset(seed=s)`` draws the initial state as diffusion_policy does for its seed s;
    ``reset(options={"state": [5 numbers]})`` sets it exactly, at rest.  ``info`` has what demonstrations
    record: ``state``, ``keypoint`` ``[9, 2]``, ``n_contacts``; and ``corners`` ``[8, 2]`` and ``coverage``.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        obs_type: str = "state",
        render_mode: str | None = None,
        render_size: int = 96,
        control_hz: float = CONTROL_HZ,
        terminates: bool = True,
    ) -> None:
        self.terminates = terminates
        self.control_hz = float(control_hz)
        if control_hz <= 0 or (PHYSICS_HZ / control_hz) % 1:
            raise ValueError(f"{control_hz=} must divide the physics' {PHYSICS_HZ} Hz")
        self._substeps = round(PHYSICS_HZ / control_hz)
        self.metadata = {**self.metadata, "render_fps": control_hz}
        self._observe, self.observation_space = self._observation(obs_type)
        self.action_space = spaces.Box(0.0, float(WORLD), (2,), np.float64)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"{render_mode=} must be one of {self.metadata['render_modes']} or None")
        self.render_mode = render_mode
        self.render_size = render_size
        self._place_goal(GOAL_POSE)
        self._window: pygame.Surface | None = None
        self._last_action: pymunk.Vec2d | None = None
        self._n_contacts = 0
        self._friction = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        state = (options or {}).get("state")
        if state is None:
            state = self.initial_state(seed if seed is not None else int(self.np_random.integers(2**31)))
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"state must be 5 finite numbers (pusher x, y, block x, y, angle), got {state}")
        self._build()
        self._place_goal(GOAL_POSE)
        self._place(state)
        # One step, as the original takes it: the solver's first step has no previous one to warm-start
        # from, and replays of the recorded demonstrations drift without it.  It may push bodies that
        # overlap, so the state is set once more.
        self._space.step(1 / PHYSICS_HZ)
        self._place(state)
        self._last_action, self._n_contacts = None, 0
        if self.render_mode == "human":
            self.render()
        return self._observe(), self._info()

    @staticmethod
    def initial_state(seed: int) -> NDArray[np.float64]:
        """The state ``[5]`` that diffusion_policy's environment starts from with this seed."""
        draw = np.random.RandomState(seed)
        x, y = draw.randint(50, 450), draw.randint(50, 450)
        block_x, block_y = draw.randint(100, 400), draw.randint(100, 400)
        return np.array([x, y, block_x, block_y, draw.randn() * 2 * np.pi - np.pi])

    def step(self, action: NDArray[np.float64]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        target = pymunk.Vec2d(float(action[0]), float(action[1]))
        if not (math.isfinite(target.x) and math.isfinite(target.y)):
            raise ValueError(f"action must be two finite numbers, got {action}")
        dt, self._n_contacts = 1 / PHYSICS_HZ, 0
        self._last_action = target
        for _ in range(self._substeps):
            acceleration = K_P * (target - self._pusher.position) - K_V * self._pusher.velocity
            self._pusher.velocity += acceleration * dt
            self._advance(dt)
        info = self._info()
        reward = min(1.0, info["coverage"] / SUCCESS_COVERAGE)
        if self.render_mode == "human":
            self.render()
        return self._observe(), reward, self.terminates and info["success"], False, info

    def change_friction(self, change: float) -> None:
        """Gives the contact of pusher and block this coefficient of friction, from the next reset on; they
        slide on each other without any otherwise.

        Raises:
            ValueError: it is below 0.
        """
        if not 0 <= change < math.inf:
            raise ValueError("PushT's pusher and block have no friction to lose: 0 or above")
        self._friction = float(change)

    @property
    def hold_action(self) -> NDArray[np.float64]:
        """The action that keeps the pusher where it is, ``[2]``."""
        return np.array(self._pusher.position)

    @property
    def state(self) -> NDArray[np.float64]:
        """``[5]``: pusher x, y, block x, y, block angle in [0, 2 pi)."""
        block = self._block
        return np.array([*self._pusher.position, *block.position, block.angle % (2 * np.pi)])

    def keypoints(self) -> NDArray[np.float64]:
        """The block's nine keypoints in the world, ``[9, 2]``."""
        return to_world(KEYPOINTS, *self._block.position, self._block.angle)

    def corners(self) -> NDArray[np.float64]:
        """The corners of the block's parts in the world, ``[8, 2]``."""
        return to_world(CORNERS, *self._block.position, self._block.angle)

    def coverage(self) -> float:
        """The share of the target that the block covers."""
        block = placed_t(*self._block.position, self._block.angle)
        return float(self._goal.intersection(block).area / self._goal.area)

    def render(self) -> NDArray[np.uint8] | None:
        """``rgb_array``: ``[render_size, render_size, 3]``; ``human``: shown in a window."""
        if self.render_mode == "human":
            self._show()
            return None
        return self.picture(self.render_size)

    def picture(self, size: int) -> NDArray[np.uint8]:
        """The scene as RGB, ``[size, size, 3]`` uint8."""
        scaled = pygame.transform.smoothscale(self._draw(), (size, size))
        return np.ascontiguousarray(pygame.surfarray.array3d(scaled).swapaxes(0, 1))

    def camera(self) -> NDArray[np.uint8]:
        """The scene as the human demonstrations' pictures show it, ``[96, 96, 3]`` uint8: interpolated from
        the nearest pixels of the drawn world alone."""
        world = pygame.surfarray.array3d(self._draw(action=False)).swapaxes(0, 1)
        places = (np.arange(CAMERA_SIZE) + 0.5) * WORLD / CAMERA_SIZE - 0.5
        first = places.astype(int)
        part = (places - first)[:, None]
        rows = world[first] * (1 - part[:, None]) + world[first + 1] * part[:, None]
        return np.rint(rows[:, first] * (1 - part) + rows[:, first + 1] * part).astype(np.uint8)

    def close(self) -> None:
        if self._window is not None:
            pygame.display.quit()
            self._window = None

    def _observation(self, obs_type: str) -> tuple[Callable[[], Any], spaces.Space[Any]]:
        """The function that observes, and the space of its observations."""
        pusher = spaces.Box(0.0, float(WORLD), (2,), np.float64)
        image = spaces.Box(0, 255, (96, 96, 3), np.uint8)
        high = np.array([WORLD, WORLD, WORLD, WORLD, 2 * np.pi])
        # The block's keypoints can pass the walls by the T's length.
        reach = np.full(20, 150.0)
        kinds: dict[str, tuple[Callable[[], Any], spaces.Space[Any]]] = {
            "state": (lambda: self.state, spaces.Box(np.zeros(5), high, dtype=np.float64)),
            "keypoints": (
                lambda: np.concatenate((self.keypoints().reshape(-1), np.array(self._pusher.position))),
                spaces.Box(-reach, WORLD + reach, dtype=np.float64),
            ),
            "corners": (
                lambda: np.concatenate((np.array(self._pusher.position), self.corners().reshape(-1))),
                spaces.Box(-reach[:18], WORLD + reach[:18], dtype=np.float64),
            ),
            "image": (
                lambda: {"image": self.camera(), "agent_pos": np.array(self._pusher.position)},
                spaces.Dict({"image": image, "agent_pos": pusher}),
            ),
        }
        if obs_type not in kinds:
            raise ValueError(f"{obs_type=} must be one of {sorted(kinds)}")
        return kinds[obs_type]

    def _info(self) -> dict[str, Any]:
        coverage = self.coverage()
        return {
            "state": self.state,
            "keypoint": self.keypoints(),
            "corners": self.corners(),
            "n_contacts": np.array([self._n_contacts], dtype=np.float64),
            "coverage": coverage,
            "success": coverage > SUCCESS_COVERAGE,
        }

    def _build(self) -> None:
        space = pymunk.Space()
        space.gravity = 0, 0
        space.damping = 0
        for a, b in zip(WALLS, [*WALLS[1:], WALLS[0]], strict=True):
            space.add(pymunk.Segment(space.static_body, a, b, 2))

        self._pusher = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        space.add(self._pusher, pymunk.Circle(self._pusher, PUSHER_RADIUS))

        # The stem's moment is computed from the bar's outline, as the original does.
        self._block = pymunk.Body(1, 2 * pymunk.moment_for_poly(1, BAR))
        bar, stem = pymunk.Poly(self._block, BAR), pymunk.Poly(self._block, STEM)
        self._block.center_of_gravity = (bar.center_of_gravity + stem.center_of_gravity) / 2
        space.add(self._block, bar, stem)
        for shape in (*self._block.shapes, *self._pusher.shapes):  # a contact has the product of both
            shape.friction = math.sqrt(self._friction)
        space.on_collision(post_solve=self._count_contacts)
        self._space = space

    def _count_contacts(self, arbiter: pymunk.Arbiter, space: pymunk.Space, data: Any) -> None:
        self._n_contacts += len(arbiter.contact_point_set.points)

    def _advance(self, dt: float) -> None:
        """Takes one step of the physics, ``dt`` seconds."""
        self._space.step(dt)

    def _place_goal(self, pose: tuple[float, float, float]) -> None:
        """Puts the target to a pose: x, y, angle."""
        self._goal_pose, self._goal = pose, placed_t(*pose)

    def _place(self, state: NDArray[np.float64]) -> None:
        self._pusher.position = float(state[0]), float(state[1])
        # Angle first: turning the body about its center of gravity moves its position.
        self._block.angle = float(state[4])
        self._block.position = float(state[2]), float(state[3])
        self._pusher.velocity = self._block.velocity = 0, 0
        self._block.angular_velocity = 0

    def _draw(self, action: bool = True) -> pygame.Surface:
        """The world, a pixel of it a pixel; with a cross for the last action, if asked for."""
        surface = pygame.Surface((WORLD, WORLD))
        surface.fill(COLORS["background"])
        for part in (BAR, STEM):
            corners = to_world(np.array(part), *self._goal_pose)
            pygame.draw.polygon(surface, COLORS["goal"], np.rint(corners).tolist())
        for a, b in zip(WALLS, [*WALLS[1:], WALLS[0]], strict=True):
            thick_line(surface, COLORS["wall"], np.array(a), np.array(b))
        pusher = tuple(np.rint(self._pusher.position))
        pygame.draw.circle(surface, COLORS["pusher"], pusher, PUSHER_RADIUS)
        pygame.draw.circle(surface, lighter(COLORS["pusher"]), pusher, PUSHER_RADIUS - 4)
        for part in (BAR, STEM):
            corners = np.rint(to_world(np.array(part), *self._block.position, self._block.angle))
            pygame.draw.polygon(surface, lighter(COLORS["block"]), corners.tolist())
            for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
                thick_line(surface, COLORS["block"], a, b)
        if action and self._last_action is not None:
            x, y = self._last_action
            pygame.draw.line(surface, COLORS["action"], (x - 8, y), (x + 8, y), 3)
            pygame.draw.line(surface, COLORS["action"], (x, y - 8), (x, y + 8), 3)
        return surface

    def _show(self) -> None:
        if self._window is None:
            pygame.display.init()
            pygame.display.set_caption("PushT")
            self._window = pygame.display.set_mode((WORLD, WORLD))
        pygame.event.pump()
        self._window.blit(self._draw(), (0, 0))
        pygame.display.flip()

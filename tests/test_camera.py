"""Pictures show the present scene, the right way up; without OpenGL there is a line with the remedy."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from paradiffpolicy.envs.robosuite import camera
from paradiffpolicy.envs.robosuite.camera import GLContext, MissingGLError, SceneCamera

SIZE = 96


class TestWithoutOpenGL:
    @pytest.fixture(autouse=True)
    def _linux(self, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(camera.platform, "system", lambda: "Linux")

    def test_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(camera, "LIBRARIES", {"egl": ("libnone.so.1",), "osmesa": ("libnone.so",)})
        with pytest.raises(MissingGLError, match=r"install libegl1 libegl-mesa0 .*, or libosmesa6") as caught:
            camera.choose_kind()
        assert "\n" not in str(caught.value)

    def test_a_library_that_fails_says_what_to_install(self, monkeypatch):
        def fail(name):
            raise RuntimeError("no device\nat all")

        monkeypatch.setattr(camera.importlib, "import_module", fail)
        with pytest.raises(MissingGLError, match=r"with egl \(no device\): install libegl1") as caught:
            GLContext("egl")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("installed", "kind"), [("libEGL.so.1 libOSMesa.so.8", "egl"), ("libOSMesa.so.6", "osmesa")]
    )
    def test_the_first_installed_library_is_taken(self, monkeypatch, installed, kind):
        monkeypatch.setattr(camera, "_is_there", lambda library: library in installed)
        assert camera.choose_kind() == kind

    def test_mujoco_gl_is_obeyed_or_named(self, monkeypatch):
        monkeypatch.setenv("MUJOCO_GL", "OSMesa")
        assert camera.choose_kind() == "osmesa"
        monkeypatch.setenv("MUJOCO_GL", "off")
        with pytest.raises(MissingGLError, match="MUJOCO_GL=off: unset it, or set one of egl, osmesa, glfw"):
            camera.choose_kind()


pytest.importorskip("robosuite", reason="robosuite isn't installed")

import mujoco  # noqa: E402

from paradiffpolicy.envs.robosuite.env import TASKS, RobosuiteEnv  # noqa: E402

from .robosuite_envs import shared_env  # noqa: E402


@pytest.fixture(scope="module")
def gl():
    try:
        return camera.gl_context()
    except MissingGLError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lift(gl):
    env = RobosuiteEnv("lift", "delta", render_mode="rgb_array", render_size=SIZE)
    yield env
    env.close()


def scene(env):
    return env.simulation.mujoco_model, env.simulation.mujoco_data


def pixel(env, view, point, size):
    """Row and column where the point ``[3]`` is seen."""
    model, data = scene(env)
    index = model.camera(view).id
    x, y, z = data.cam_xmat[index].reshape(3, 3).T @ (point - data.cam_xpos[index])
    scale = size / 2 / np.tan(np.deg2rad(model.cam_fovy[index]) / 2)
    return round(size / 2 + scale * y / z), round(size / 2 - scale * x / z)


@pytest.mark.parametrize("place", [(0.1, 0.15, 0.83), (-0.05, -0.2, 0.83)])
def test_things_are_where_they_are_seen(lift, place):
    """Upright and not mirrored: the red cube's picture is where its middle is projected to."""
    lift.reset(seed=0)
    model, data = scene(lift)
    data.joint("cube_joint0").qpos[:3] = place
    mujoco.mj_forward(model, data)
    row, column = pixel(lift, "agentview", np.array(place), SIZE)
    assert is_red(lift._draw("agentview", SIZE))[row, column]


def is_red(picture):
    """Which pixels ``[H, W]`` show the cube."""
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return (red > 60) & (red > 2 * green) & (red > 2 * blue)


def test_lifts_picture_shows_the_lift(lift):
    """Raised by 10 cm, the cube is seen well above where it was, against the wall instead of the table."""
    lift.reset(seed=0)
    model, data = scene(lift)
    rows = []
    for height in (0.83, 0.93):
        data.joint("cube_joint0").qpos[:3] = (0, 0, height)
        mujoco.mj_forward(model, data)
        rows.append(np.nonzero(is_red(lift.picture(SIZE)))[0])
        assert 20 < len(rows[-1]) < SIZE**2 / 10
    assert rows[1].max() + SIZE / 20 < rows[0].min()


def test_pictures_are_of_now(lift):
    """After a control step, also in the hand's camera, which moves with it."""
    lift.reset(seed=0)
    lift.step(np.array([0.5, -0.5, -1, 0, 0, 0.5, 0]))
    now = lift._draw("robot0_eye_in_hand", SIZE)
    model, data = scene(lift)
    mujoco.mj_forward(model, data)
    np.testing.assert_array_equal(lift._draw("robot0_eye_in_hand", SIZE), now)


def test_collision_shapes_are_not_seen(lift):
    lift.reset(seed=0)
    model, _ = scene(lift)
    before, colors = lift.picture(SIZE), np.array(model.geom_rgba)
    model.geom_rgba[model.geom_group == 0] = (0, 1, 0, 1)
    np.testing.assert_array_equal(lift.picture(SIZE), before)
    model.geom_rgba[:] = colors
    model.geom_rgba[model.geom_group == 1] = (0, 1, 0, 0)
    assert not np.array_equal(lift.picture(SIZE), before)
    model.geom_rgba[:] = colors


def test_looking_changes_nothing(lift):
    """Bit by bit."""
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    lift.reset(seed=1)
    unseen = [lift.step(action)[-1]["states"] for action in actions]
    lift.reset(seed=1)
    for action, states in zip(actions, unseen, strict=True):
        lift.picture(SIZE)
        np.testing.assert_array_equal(lift.step(action)[-1]["states"], states)


def test_pictures_repeat(lift):
    """In the same environment after another episode and a new model, in another that is alive at the same
    time, also when that is closed."""
    lift.reset(seed=2)
    first = lift.render()
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(lift.picture(SIZE), first)
    lift.reset(seed=3)
    second = lift.render()
    assert not np.array_equal(second, first)
    other = shared_env("lift")
    other.reset(seed=3)  # its first cube is this seed's; the other environment's was of another size
    np.testing.assert_array_equal(other.picture(SIZE), second)
    other.reset(seed=2)
    np.testing.assert_array_equal(other.picture(SIZE), first)
    lift.reset(seed=2)
    np.testing.assert_array_equal(lift.render(), first)
    np.testing.assert_array_equal(other.picture(SIZE), first)
    other._camera.close()
    assert other._camera._drawing is None
    np.testing.assert_array_equal(lift.render(), first)


def test_any_thread_may_draw(lift):
    lift.reset(seed=0)
    pictures = [lift.picture(SIZE)]
    thread = threading.Thread(target=lambda: pictures.append(lift.picture(SIZE)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_a_forked_process_says_that_it_cannot_draw(lift):
    """OpenGL would wait for ever there; physics go on, and nothing is freed."""
    lift.reset(seed=0)
    lift.picture(SIZE)
    here, there = multiprocessing.get_context("fork").Pipe()

    def child():
        lift.step(np.zeros(7))
        try:
            lift.picture(SIZE)
        except MissingGLError as error:
            there.send(str(error))
        lift._camera.close()
        there.send("closed")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        assert here.poll(30) and "forked" in (message := here.recv()) and "context='spawn'" in message
        assert here.poll(30) and here.recv() == "closed"
    finally:
        process.kill()
        process.join()


def test_pictures_may_be_large(lift):
    lift.reset(seed=0)
    large = lift.picture(700)
    assert large.shape == (700, 700, 3)
    blocks = large[:672, :672].reshape(SIZE, 7, SIZE, 7, 3).mean((1, 3))
    assert np.abs(blocks - lift.picture(700)[3:672:7, 3:672:7]).mean() < 5
    assert large[-1].any() and large[:, -1].any()  # to the rim


def test_an_unknown_camera_is_named(lift):
    with pytest.raises(ValueError, match=r"no camera 'agentveiw'; there are .*agentview"):
        lift._draw("agentveiw", SIZE)


def test_unclosed_cameras_are_freed(lift):
    lift.reset(seed=0)
    one = SceneCamera()
    one.picture(*scene(lift), "agentview", SIZE)
    free = one._drawing.free
    assert free.alive
    del one
    gc.collect()
    assert not free.alive


CAMERAS = {
    "lift": ["agentview", "robot0_eye_in_hand"],
    "can": ["agentview", "robot0_eye_in_hand"],
    "square": ["agentview", "robot0_eye_in_hand"],
    "transport": ["shouldercamera0", "shouldercamera1", "robot0_eye_in_hand", "robot1_eye_in_hand"],
    "tool_hang": ["sideview", "robot0_eye_in_hand"],
}


@pytest.mark.parametrize("task", TASKS)
def test_image_observations_are_robomimics(gl, task):
    env = shared_env(task)
    observe, space = env._observation("image")
    _, info = env.reset(seed=0)
    observation = observe(info)
    assert space.contains(observation)
    images = {name for name in observation if name.endswith("_image")}
    assert images == {f"{view}_image" for view in CAMERAS[task]}
    n_arms = TASKS[task].n_arms
    assert observation.keys() - images == {
        f"robot{arm}_{part}" for arm in range(n_arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")
    }
    for name in images:
        assert observation[name].shape == (84, 84, 3) and observation[name].std() > 10
    np.testing.assert_array_equal(observation["robot0_eef_pos"], info["robot0_eef_pos"])
    assert env.picture(64).std() > 10
    env._camera.close()


def test_gymnasiums_checker_passes_with_images(gl):
    about = {"obs_type": "image", "render_mode": "rgb_array", "render_size": SIZE}
    env = gymnasium.make("paradiffpolicy/Can-v0", **about)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*we recommend using a symmetric.*")
        check_env(env.unwrapped, skip_close_check=True)
    env.close()


def test_an_unknown_observation_is_named():
    with pytest.raises(ValueError, match="obs_type='pixels' must be one of"):
        shared_env("lift")._observation("pixels")


def test_a_task_without_opengl_works_but_for_pictures(monkeypatch):
    def missing():
        raise MissingGLError("pictures need EGL or OSMesa")

    monkeypatch.setattr(camera, "gl_context", missing)
    env = shared_env("lift")
    env._camera.close()
    env.reset(seed=0)
    with pytest.raises(MissingGLError):
        env.render()

"""Pictures of a MuJoCo scene, drawn without a screen by EGL or OSMesa.

OpenGL is loaded at the first picture.  A process has one OpenGL context, which all its cameras share, and
which is current only while one of them draws: they may draw in any thread, but not in a forked process.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import os
import platform
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
"""Names of the libraries, by ``MUJOCO_GL``'s name, in the order of preference."""
WINDOWS, ON = ("glfw", "glx"), ("", "enable", "enabled", "on", "true", "1")
"""Other values of ``MUJOCO_GL``: for windows, and for any library."""
VARIABLES = "MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM"
"""Of the environment: they decide how pictures are drawn."""
REMEDY = (
    "install libegl1 libegl-mesa0 libgl1-mesa-dri, or libosmesa6 (Debian's names), or do without pictures"
)


class MissingGLError(ImportError):
    """Pictures can't be drawn."""


class GLContext:
    """An OpenGL context; inside ``with``, OpenGL can be used in this thread.

    Args:
        kind: ``egl`` or ``osmesa``; otherwise MuJoCo chooses, as on machines that aren't Linux.

    Raises:
        MissingGLError: the context can't be made; or, entering it, this process was forked from its own.
    """

    def __init__(self, kind: str) -> None:
        own = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        try:
            module = importlib.import_module(f"mujoco.{kind if kind in LIBRARIES else 'gl_context'}")
            self._context = module.GLContext(64, 64)  # scenes are drawn into buffers of their own
        except Exception as error:  # each library raises its own
            cause = (str(error).splitlines() or [""])[0] or type(error).__name__
            unset = "".join(f"unset {name} (it is {value}), or " for name, value in own.items())
            raise MissingGLError(
                f"pictures can't be drawn with {kind or 'OpenGL'} ({cause}): {unset}{REMEDY}"
            )
        finally:
            if "PYOPENGL_PLATFORM" not in own:  # left by an attempt, it would refuse others
                os.environ.pop("PYOPENGL_PLATFORM", None)
        self._release = _release(kind, module)
        self._lock, self._process = threading.Lock(), os.getpid()
        # At the process's exit the library may have ended before, and freeing would raise.
        atexit.register(setattr, self._context, "_context", None)

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the context's: OpenGL would wait for its threads for ever."""
        return os.getpid() != self._process

    def __enter__(self) -> GLContext:
        if self.is_forked:
            raise MissingGLError(
                "this process was forked from one that has drawn, and OpenGL doesn't survive that: start it "
                "with spawn, as AsyncVectorEnv(..., context='spawn')"
            )
        self._lock.acquire()
        try:
            self._context.make_current()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._release()
        finally:
            self._lock.release()


def _release(kind: str, module: Any) -> Callable[[], object]:
    """Makes the function that releases the context for other threads."""
    if kind == "egl":
        egl = module.EGL
        nothing = egl.EGL_NO_SURFACE, egl.EGL_NO_SURFACE, egl.EGL_NO_CONTEXT
        return lambda: egl.eglMakeCurrent(module.EGL_DISPLAY, *nothing)
    if kind == "osmesa":
        return lambda: module.osmesa.OSMesaMakeCurrent(None, None, module.GL.GL_FLOAT, 0, 0)
    return lambda: None


def choose_kind() -> str:
    """Chooses by ``MUJOCO_GL``, or else the first library that is installed.

    The choice comes before loading: a process that has loaded one of them can't load the other.

    Raises:
        MissingGLError: no library is installed, or ``MUJOCO_GL`` names none.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if platform.system() != "Linux" or wanted in (*LIBRARIES, *WINDOWS):
        return wanted
    if wanted not in ON:
        known = ", ".join((*LIBRARIES, *WINDOWS))
        raise MissingGLError(
            f"pictures can't be drawn with MUJOCO_GL={wanted}: unset it, or set one of {known}"
        )
    for kind, names in LIBRARIES.items():
        if any(_is_there(name) for name in names):
            return kind
    raise MissingGLError(f"pictures need EGL or OSMesa: {REMEDY}")


def _is_there(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@functools.cache
def gl_context() -> GLContext:
    """This process's OpenGL context.  Raises ``MissingGLError`` if it can't be made."""
    return GLContext(choose_kind())


@dataclass(frozen=True)
class View:
    """A camera that the scene doesn't have: it looks at a point in the world.

    Attributes:
        at: the point ``[3]``, metres.
        distance: of the camera from it, metres.
        azimuth, elevation: of the direction in which it looks, degrees: azimuth 0 is along x, 90 along y.
    """

    at: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


class SceneCamera:
    """Draws a scene: what is visible, not what collides, without shadows and reflections, which would take
    most of the time."""

    def __init__(self) -> None:
        self._drawing: _Drawing | None = None

    def picture(self, model: Any, data: Any, view: str | View, size: int) -> NDArray[np.uint8]:
        """``[size, size, 3]`` RGB, the first row at the top.

        Args:
            model: ``mujoco.MjModel``; the first picture of a model takes half a second longer.
            data: ``mujoco.MjData``, whose bodies have been placed; cameras and lights are placed here,
                which changes nothing that physics depend on.
            view: one of the scene's cameras by name, or another.
            size: in pixels.

        Raises:
            MissingGLError: it can't be drawn.
            ValueError: the scene has no camera of that name.
        """
        import mujoco

        camera = mujoco.MjvCamera()
        if isinstance(view, View):
            camera.type, camera.lookat = mujoco.mjtCamera.mjCAMERA_FREE, view.at
            camera.distance, camera.azimuth, camera.elevation = view.distance, view.azimuth, view.elevation
        else:
            camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, view)
            if camera.fixedcamid < 0:
                names = [model.camera(k).name for k in range(model.ncam)]
                raise ValueError(f"there is no camera {view!r}; there are {', '.join(names)}")
        if self._drawing is None or self._drawing.model is not model:
            self.close()
            self._drawing = _Drawing(model)
        mujoco.mj_camlight(model, data)
        return self._drawing.draw(data, camera, size)

    def close(self) -> None:
        """Frees OpenGL's copy of the scene; another picture makes a new one."""
        if self._drawing is not None:
            self._drawing.free()
            self._drawing = None


class _Drawing:
    """OpenGL's copy of a model's shapes and textures."""

    def __init__(self, model: Any) -> None:
        import mujoco

        self.model, self._gl = model, gl_context()
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0], self._option.geomgroup[1] = 0, 1  # robosuite's: collide, are seen
        with self._gl:
            try:
                self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
            except mujoco.FatalError as error:  # as GLFW without a screen
                raise MissingGLError(f"pictures can't be drawn ({error}): {REMEDY}")
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        # Also without close(), but not at the process's exit: OpenGL is gone by then.
        self.free = weakref.finalize(self, _free, self._gl, self._context)
        self.free.atexit = False

    def draw(self, data: Any, camera: Any, size: int) -> NDArray[np.uint8]:
        """A ``mujoco.MjvCamera``'s picture."""
        import mujoco

        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            self.model, data, self._option, mujoco.MjvPerturb(), camera, everything, self._scene
        )
        frame = mujoco.MjrRect(0, 0, size, size)
        picture = np.empty((size, size, 3), np.uint8)
        with self._gl:
            if size > min(self._context.offWidth, self._context.offHeight):
                mujoco.mjr_resizeOffscreen(size, size, self._context)
            mujoco.mjr_render(frame, self._scene, self._context)
            mujoco.mjr_readPixels(picture, None, frame, self._context)
        return np.ascontiguousarray(picture[::-1])  # OpenGL counts from the bottom


def _free(gl: GLContext, context: Any) -> None:
    if not gl.is_forked:
        with gl:
            context.free()

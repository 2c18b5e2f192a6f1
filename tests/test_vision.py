"""Policies with cameras: pictures in, the same plan wherever it is made."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiffpolicy.benchmarks.training import reading_rows
from paradiffpolicy.clock import MonotonicClock, VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.loop import ControlLoop
from paradiffpolicy.control.record import Fault
from paradiffpolicy.control.watchdog import Watchdog
from paradiffpolicy.data.dataset import WindowDataset, batch_windows
from paradiffpolicy.data.pictures import agreed_cameras, recorded_cameras
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.data.splitting import split
from paradiffpolicy.envs.pusht_episodes import mirrored
from paradiffpolicy.errors import InputError
from paradiffpolicy.export.onnx_model import onnx_model
from paradiffpolicy.export.plan import plan_program
from paradiffpolicy.history import History
from paradiffpolicy.interchange.reading import read_checkpoint
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.models.pictures import jitter_factors, jittered, resizing
from paradiffpolicy.models.vision import (
    FrozenBatchNorm,
    PictureEncoder,
    ResNet18,
    ResNetOptions,
    Sight,
    VisualNetwork,
)
from paradiffpolicy.observation import InvalidObservationError
from paradiffpolicy.planning.inline import InlinePlanner
from paradiffpolicy.planning.process import ProcessPlanner
from paradiffpolicy.planning.request import PlanRequest
from paradiffpolicy.policy import Policy
from paradiffpolicy.recorded_env import RecordedEnv
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.serving.remote import RemotePolicy
from paradiffpolicy.task import Camera, Contract, ObservationField
from paradiffpolicy.telemetry.recorder import DatasetRecorder
from paradiffpolicy.training.distillation import Distillation, student_spec, teacher_sampler
from paradiffpolicy.training.objective import WHOLE
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer
from paradiffpolicy.types import Noise, PolicySpec

from .conftest import assert_close, fixtures, run_script_file, tiny_checkpoint, toy_episode
from .test_serving import ask, client, running
from .test_telemetry import delayed

CONTRACT = Contract(
    (ObservationField("state", 0, 2, shape=(5,)),),
    "position",
    cameras=(Camera("img", (40, 36, 3)), Camera("wrist", (40, 36, 3))),
)
SEEING = PolicySpec(
    "pusht",
    obs_dim=2,
    action_dim=2,
    down_dims=(16, 32),
    diffusion_step_embed_dim=16,
    contract=CONTRACT,
    encoder_options={"width": 8, "keypoints": 4, "crop": [36, 34]},
    image_features=32,
)


def seeing(spec: PolicySpec = SEEING, **sampler) -> Policy:
    sampler = sampler or {"solver": "ddim", "n_steps": 4}
    return Policy.from_checkpoint(tiny_checkpoint(spec), spec_sampler(spec, **sampler))


def observations(count: int, seed: int = 0, contract: Contract = CONTRACT) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    pictures = [
        {camera.key: draw.integers(0, 256, camera.shape, dtype=np.uint8) for camera in contract.cameras}
        for _ in range(count)
    ]
    return [{"state": draw.uniform(0, 512, 5), **each} for each in pictures]


def records(count: int, seed: int = 0) -> np.ndarray:
    return np.stack([CONTRACT.record(each) for each in observations(count, seed)])


# ------------------------------------------------------------------------------------------ observations


def test_a_window_of_dicts_is_a_window_of_records():
    policy, dicts = seeing(), observations(2)
    plan = policy.plan(dicts, generator=1)
    assert torch.equal(plan.actions, policy.plan(records(2), generator=1).actions)
    window = policy.checked(dicts)
    assert torch.equal(window.numbers[0, 1], torch.from_numpy(dicts[1]["state"][:2]))
    both = np.concatenate([dicts[1][key].reshape(-1) for key in ("img", "wrist")])
    assert np.array_equal(window.pixels[0, 1].numpy(), both)


def test_records_that_are_read_only_are_planned_from_as_they_are():
    """As a planner's process gets them; with warnings as errors."""
    given, policy = records(2), seeing()
    fixed = np.frombuffer(given.tobytes(), given.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window = policy.checked(fixed)
    own = policy.checked(given)
    given["img"][:] = 0
    assert torch.equal(own.pixels, window.pixels) and own.pixels.any()


def test_every_camera_and_step_is_seen():
    policy, dicts = seeing(), observations(2)
    whole = policy.condition(dicts)
    for step in range(2):
        for key in ("img", "wrist"):
            other = [dict(each) for each in dicts]
            other[step][key] = np.zeros_like(other[step][key])
            assert not torch.allclose(policy.condition(other), whole, atol=1e-3)


BAD = {
    "no 'wrist'": lambda seen: seen.pop("wrist"),
    "expected (40, 36, 3)": lambda seen: seen.update(img=np.zeros((40, 30, 3), np.uint8)),
    "channels come last": lambda seen: seen.update(img=np.zeros((3, 40, 36), np.uint8)),
    "float64, expected uint8": lambda seen: seen.update(img=np.zeros((40, 36, 3))),
    "no 'state'": lambda seen: seen.pop("state"),
}


@pytest.mark.parametrize("part", BAD)
def test_a_bad_observation_is_named(part):
    policy, (seen,) = seeing(), observations(1)
    BAD[part](seen)
    message = part.replace("no 'wrist'", "no picture of camera 'wrist'")
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        policy.plan(seen)
    watchdog = Watchdog(SEEING, max_observation_age=1.0)
    assert watchdog.check_observation(records(1)[0], 0.0)[1] is Fault.NONE
    assert watchdog.check_observation(seen, 0.0) == (None, Fault.OBSERVATION_SHAPE)
    assert message in watchdog.in_words(Fault.OBSERVATION_SHAPE)


def test_vectors_and_nan_are_refused():
    policy = seeing()
    with pytest.raises(InvalidObservationError, match="'img', 'wrist': give a dict"):
        policy.plan([1.0, 2.0])
    bad = records(2)
    bad["numbers"][1, 0] = np.nan
    with pytest.raises(InvalidObservationError, match="NaN or infinity at step 1, column 0"):
        policy.plan(bad)
    watchdog = Watchdog(SEEING, max_observation_age=1.0)
    assert watchdog.check_observation(bad[1], 0.0)[1] is Fault.OBSERVATION_NOT_FINITE


def test_a_frozen_camera_is_not_a_new_picture():
    watchdog, record = Watchdog(SEEING, max_observation_age=9.0, frozen_after=0.5), records(1)[0]
    assert watchdog.check_observation(record, 0.0)[1] is Fault.NONE
    moved = record.copy()
    moved["wrist"][3, 3, 0] ^= 1
    assert watchdog.check_observation(moved, 0.6)[1] is Fault.NONE
    assert watchdog.check_observation(moved, 1.2)[1] is Fault.OBSERVATION_FROZEN


def test_a_history_between_ticks_takes_the_nearer_picture():
    history, seen = History(2, 1.25), records(3)
    for each in seen:
        history.push(each)
    window = history.window()  # the older one lies at tick 0.75
    assert_close(
        torch.from_numpy(window["numbers"][0]), torch.from_numpy(seen["numbers"][0:2].T @ [0.25, 0.75])
    )
    assert np.array_equal(window["img"], seen["img"][[1, 2]])


@pytest.mark.parametrize(
    ("camera", "said"),
    [
        (("img", (3, 96, 96)), "channels come last"),
        (("img", (96, 96)), "must be"),
        (("img", (0, 96, 3)), "1 to 4096"),
        (("", (96, 96, 3)), "key"),
    ],
)
def test_bad_cameras(camera, said):
    with pytest.raises(InputError, match=said):
        Camera(*camera)


def test_bad_specs():
    with pytest.raises(InputError, match="image_features=0"):
        replace(SEEING, image_features=0)
    with pytest.raises(InputError, match="different keys"):
        Contract(cameras=CONTRACT.cameras[:1] * 2)
    for options, said in (
        ({"crop": [41, 3]}, "larger than pictures of 'img'"),
        ({"cropp": [3, 3]}, "no option 'cropp'"),
        ({"width": 0}, "width=0"),
        ({"crop": [32, 32]}, "leave one pixel"),
        ({"std": [0, 1, 1]}, "std="),
        ({"mean": [[1, 2]]}, "mean="),
        ({"pool": "max"}, "pool='max'"),
        ({"norm": "layer"}, "unknown norm"),
        ({"pool": "average"}, "gives 512 features"),
    ):
        with pytest.raises(InputError, match=said):
            tiny_checkpoint(replace(SEEING, encoder_options=options))
    assert PolicySpec.from_dict({**vars(SEEING), "contract": CONTRACT.to_dict()}) == SEEING


# --------------------------------------------------------------------------------------------- encoder


def test_a_random_crop_is_cut_where_it_was_drawn():
    camera = Camera("img", (9, 8, 3))
    encoder = PictureEncoder([camera], ResNetOptions(width=8, pool="average", crop=(5, 4)), 64)
    picture = torch.arange(2 * 2 * 9 * 8 * 3).view(2, 2, 9, 8, 3)
    places = torch.rand((2, 2), generator=torch.Generator().manual_seed(0))
    cropped = encoder._cropped(picture, camera, places)
    for row, (top, left) in enumerate((places * 5).long().tolist()):
        assert torch.equal(cropped[row], picture[row, :, top : top + 5, left : left + 4])
    for place in (0.0, 0.999999):
        corner = encoder._cropped(picture, camera, torch.full((2, 2), place))
        first = 4 * round(place)
        assert torch.equal(corner, picture[:, :, first : first + 5, first : first + 4])
    middle = encoder._cropped(picture, camera, None)
    assert torch.equal(middle, picture[:, :, 2:7, 2:6])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 50))
def test_resizing_is_a_matrix(old, new):
    x = torch.rand(1, 1, old, 7, generator=torch.Generator().manual_seed(old))
    theirs = torch.nn.functional.interpolate(x, (new, 7), mode="bilinear", antialias=True)
    assert_close(resizing(old, new) @ x, theirs, atol=1e-5)


def test_pictures_are_resized_then_cropped():
    spec = replace(SEEING, encoder_options={**SEEING.encoder_options, "resize": [38, 37], "crop": [35, 36]})
    policy, dicts = seeing(spec), observations(2)
    encoder = policy.model.whole.encoder
    seen = []
    encoder.networks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy.condition(dicts)
    x = torch.from_numpy(np.stack([each["img"] for each in dicts])).permute(0, 3, 1, 2) / 255 * 2 - 1
    x = torch.nn.functional.interpolate(x, (38, 37), mode="bilinear", antialias=True)
    assert_close(seen[0], x[:, :, 2:37, 0:36], atol=1e-5)  # torchvision rounds 1.5 to 2, and 0.5 to 0


def test_jittered_colours_are_by_the_formulas():
    """Pixel by pixel, with the mean over the picture: brightness, then contrast, then saturation."""
    picture = torch.randint(0, 256, (2, 2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    factors = torch.tensor([[1.4, 0.6, 1.7], [0.3, 1.8, 0.0]])
    done = jittered(picture, factors)

    def bounded(value: float) -> float:
        return min(max(value, 0.0), 255.0)

    def grey(pixel: list[float]) -> float:
        return 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]

    for row, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        for step in range(2):
            pixels = picture[row, step].flatten(1).T.tolist()
            pixels = [[bounded(brightness * value) for value in pixel] for pixel in pixels]
            mean = sum(map(grey, pixels)) / len(pixels)
            pixels = [[bounded(contrast * v + (1 - contrast) * mean) for v in pixel] for pixel in pixels]
            pixels = [[bounded(saturation * v + (1 - saturation) * grey(p)) for v in p] for p in pixels]
            assert_close(done[row, step].flatten(1).T, torch.tensor(pixels), atol=1e-3)
    assert (done[1, :, 0] - done[1, :, 2]).abs().max() < 1e-3  # without saturation all is grey
    assert_close(jittered(picture, torch.ones(2, 3)), picture, atol=1e-3)


def test_factors_are_around_one():
    drawn = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.25]])
    factors = torch.tensor([[0.7, 1.0, 0.0], [1.3, 1.0, 3.0], [1.0, 1.0, 0.75]])
    assert_close(jitter_factors((0.3, 0.0, 2.0), drawn), factors)


JITTERED = replace(SEEING, encoder_options={**SEEING.encoder_options, "jitter": [0.3, 0.4, 0.5]})


@pytest.mark.parametrize("resize", [None, [38, 37]], ids=str)
def test_each_camera_of_a_row_has_its_own_colours(resize):
    spec = replace(JITTERED, encoder_options={**JITTERED.encoder_options, "resize": resize})
    encoder, plain = (build_network(each).encoder for each in (spec, replace(spec, encoder_options={})))
    assert isinstance(encoder, PictureEncoder) and isinstance(plain, PictureEncoder)
    pixels = torch.from_numpy(
        np.stack([records(2), records(2, 1)]).view(np.uint8).reshape(2, 2, -1)[..., 16:]
    )
    colours = torch.full((2, 2, 3), 0.5)
    as_it_is, usual = encoder(pixels), encoder(pixels, None, colours)
    assert_close(usual, as_it_is, atol=1e-4)
    changed = colours.clone()
    changed[1, 0] = 0.0  # the second row's first camera
    other = (encoder(pixels, None, changed) - as_it_is).abs().amax(dim=1)  # over both steps
    assert other[0].max() < 1e-4 and other[1, 16:].max() < 1e-4 < 1e-2 < other[1, :16].max()


def test_plans_and_validation_see_the_colours_as_they_are():
    jittering, plain = seeing(JITTERED), seeing(SEEING)
    assert torch.equal(jittering.condition(observations(2)), plain.condition(observations(2)))


@pytest.mark.parametrize(
    "jitter", [[0.1, 0.2], [0.1, 0.2, -0.3], [0.1, 0.2, True], 0.3, [0.1, 0.2, math.nan]]
)
def test_a_jitter_is_three_strengths(jitter):
    options = {**SEEING.encoder_options, "jitter": jitter}
    with pytest.raises(InputError, match=r"must be \[brightness, contrast, saturation\], each from 0 to 10"):
        tiny_checkpoint(replace(SEEING, encoder_options=options))


def test_a_shared_encoder_sees_all_cameras():
    spec = replace(SEEING, encoder_options={**SEEING.encoder_options, "shared": True})
    policy, dicts = seeing(spec), observations(2)
    same = [{**each, "wrist": each["img"]} for each in dicts]
    features = policy.condition(same).view(2, 2 + 32)[:, 2:].view(2, 2, 16)
    assert torch.equal(features[:, 0], features[:, 1])
    assert len(policy.model.whole.encoder.networks) == 1


def test_frozen_batch_norm_is_batch_norm():
    torch.manual_seed(0)
    ours, theirs = ResNet18(8, FrozenBatchNorm), torch.nn.BatchNorm2d(8).eval()
    norm = ours.bn1
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).data = torch.randn(8)
    norm.running_var = torch.rand(8) + 0.5
    theirs.load_state_dict(norm.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    x = torch.randn(2, 8, 5, 5)
    assert_close(norm(x), theirs(x), atol=1e-5)


# ------------------------------------------------------------------------------------ the same everywhere


@pytest.mark.parametrize("options", [{}, {"resize": [38, 38], "norm": "batch", "shared": True}], ids=str)
def test_captured_plans_are_eager_ones(options):
    spec = replace(SEEING, encoder_options={**SEEING.encoder_options, **options})
    policy, dicts = seeing(spec), np.stack([records(2), records(2, 1), records(2, 2)])
    emulated = policy.captured("emulated").plan(dicts[:2], generator=0)
    assert torch.equal(emulated.actions, policy.plan(dicts[:2], generator=0).actions)
    plan = policy.plan(dicts, generator=0)
    openvino = policy.captured("openvino", precision="f32", cache=None).plan(dicts, generator=0)
    assert_close(openvino.actions, plan.actions, atol=5e-3)  # of 512 px


def test_guidance_blanks_the_pictures_too():
    spec = replace(SEEING, condition_dropout=0.1)
    policy, dicts = seeing(spec), observations(2)
    black = policy.with_guidance(0.0)
    assert torch.equal(black.plan(dicts).actions, black.plan(observations(2, 5)).actions)
    assert_close(policy.with_guidance(1.0).plan(dicts).actions, policy.plan(dicts).actions, atol=1e-3)


def test_an_exported_plan_sees():
    import onnxruntime

    policy, dicts = seeing(), records(2)
    model = onnx_model(plan_program(policy, warm=False), "plan")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    window, plan = policy.checked(dicts), policy.plan(dicts, generator=3)
    given = {"observation": window.numbers.float(), "pixels": window.pixels, "x_T": plan.solution.noise.x_T}
    (actions, *_) = session.run(["actions"], {name: value.numpy() for name, value in given.items()})
    assert_close(torch.from_numpy(actions), plan.actions, atol=5e-3)


def test_a_planner_in_a_process_plans_what_one_within_the_loop_plans():
    policy, clock = seeing(), MonotonicClock()
    request = PlanRequest(3, 0, 1, 0.0, records(2))
    inline = InlinePlanner(policy, torch.Generator().manual_seed(4), clock)
    inline.start()
    inline.request(request)
    beside = ProcessPlanner(policy, torch.Generator().manual_seed(4), clock)
    beside.start()
    try:
        beside.request(request)
        reply = None
        while reply is None:
            assert beside.wait(60)
            reply = beside.poll()
    finally:
        beside.stop()
    assert reply.fault == "" and np.array_equal(reply.actions, inline.poll().actions)


def test_a_remote_plan_is_the_local_one():
    policy, dicts = seeing(), observations(2)
    with running(policy, max_message=2**20) as uri:
        with RemotePolicy(uri) as remote:
            windows = np.stack([records(2), records(2, 1)])
            local = policy.plan(windows, generator=7)
            assert torch.equal(remote.warm_up().plan(windows, generator=7).actions, local.actions)
        with client(uri) as connection:
            answer = ask(connection, observation=dicts[0], seed=3)
            alone = policy.plan(dicts[0], generator=torch.Generator().manual_seed(3))
            assert np.array_equal(answer["plan"], alone.actions[0].numpy())
            assert "camera 'img' gives float64" in str(
                ask(connection, observation={**dicts[0], "img": np.zeros((40, 36, 3))})
            )
            assert "must be a map of ['state', 'img', 'wrist']" in str(ask(connection, observation=[1, 2]))


# -------------------------------------------------------------------------------------------- datasets


def seen_episode(length: int, seed: int = 0, kind: type = np.uint8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    pictures = {
        camera.key: draw.integers(0, 256, (length, *camera.shape)).astype(kind) for camera in CONTRACT.cameras
    }
    return {**toy_episode(length, seed), **pictures}


@pytest.fixture
def store(tmp_path) -> ReplayBuffer:
    buffer = ReplayBuffer.create(tmp_path / "seen.zarr")
    for seed, kind in enumerate((np.float32, np.float32, np.float32)):
        buffer.append(seen_episode(12 + seed, seed, kind))
    return buffer


def windows_of(buffer: ReplayBuffer) -> WindowDataset:
    sizes = {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8}
    return WindowDataset.of(buffer, CONTRACT.observation, **sizes, cameras=CONTRACT.cameras)


def test_windows_have_the_pictures_of_their_steps(store):
    data, pictures = windows_of(store), {key: store.read(key) for key in ("img", "wrist")}
    windows = torch.tensor([0, 3, 7])
    seen = data.records(windows, CONTRACT)
    steps = data.steps[windows, :2].numpy()
    assert np.array_equal(seen["numbers"], store.read("state")[steps][..., :2])
    for key, recorded in pictures.items():
        assert np.array_equal(seen[key], recorded[steps])
    _, held_out = split(data, [1])
    first = held_out.records(torch.tensor([0]), CONTRACT)
    assert np.array_equal(first["img"][0, 1], pictures["img"][12])


def test_pictures_that_are_no_bytes_are_refused(tmp_path):
    buffer = ReplayBuffer.create(tmp_path / "halves.zarr")
    buffer.append({**seen_episode(20), "img": np.full((20, 40, 36, 3), 0.5, np.float32)})
    with pytest.raises(InputError, match="data/img isn't bytes from 0 to 255"):
        windows_of(buffer)
    with pytest.raises(InputError, match="has no camera 'front'"):
        recorded_cameras(buffer, ["front"])
    with pytest.raises(InputError, match="are \\[H, W, 3\\]"):
        recorded_cameras(buffer, ["state"])
    with pytest.raises(InputError, match="camera says shape=\\[40, 30, 3\\]"):
        agreed_cameras(buffer, [Camera("img", (40, 30, 3))])
    first = ReplayBuffer.create(tmp_path / "first.zarr")
    first.append({**toy_episode(3), "img": np.zeros((3, 3, 40, 36), np.uint8)})
    with pytest.raises(InputError, match="channels first"):
        recorded_cameras(first, ["img"])


def test_training_that_was_interrupted_ends_with_the_same_weights(store, tmp_path):
    data, spec = windows_of(store), replace(SEEING, condition_dropout=0.2)
    training = TrainSettings(n_steps=2, batch_size=2, save_every=1, log_every=1, precision="float32")
    whole = Trainer(data, spec, training, tmp_path / "whole").run(progress=False)
    Trainer(data, spec, training, tmp_path / "parts").run(until=1, progress=False)
    resumed = Trainer(data, spec, training, tmp_path / "parts").run(progress=False)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    began = fresh(spec)
    for name in ("encoder.networks.0.backbone.conv1.weight", "encoder.networks.1.backbone.conv1.weight"):
        assert not torch.equal(whole.weights[name], began[name])


def test_jitter_is_drawn_by_the_step(store, tmp_path):
    """A resumed run draws what one that was left alone draws; without jitter all else is as it was."""
    training = TrainSettings(n_steps=2, batch_size=2, save_every=1, log_every=1, precision="float32")
    data, ends = windows_of(store), {}
    for name, spec in (("plain", SEEING), ("jittered", JITTERED)):
        seen: list[Sight] = []
        trainer = Trainer(data, spec, training, tmp_path / name)
        trainer.network.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[2]))
        first = trainer.objective(trainer.network, 0, False)
        assert torch.equal(first, trainer.objective(trainer.network, 0, False))
        halves = [trainer.objective(trainer.network, 0, False, part) for part in WHOLE.split(2)]
        assert_close(sum(halves), first, atol=1e-5)
        ends[name] = first, seen[0], trainer.run(progress=False)
    (loss, sight, _), (jittered_loss, jittered_sight, whole) = ends["plain"], ends["jittered"]
    assert loss != jittered_loss and torch.equal(sight.places, jittered_sight.places)
    assert sight.colours is None and jittered_sight.colours.shape == (2, 2, 3)
    assert len(jittered_sight.colours.unique()) == 12
    Trainer(data, JITTERED, training, tmp_path / "parts").run(until=1, progress=False)
    resumed = Trainer(data, JITTERED, training, tmp_path / "parts").run(progress=False)
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


def test_a_students_lessons_are_of_what_its_teacher_sees(store):
    teacher = Policy.from_checkpoint(tiny_checkpoint(SEEING), teacher_sampler(SEEING, 4))
    data = windows_of(store)
    normal = data.normalized(teacher.observation_normalizer, teacher.action_normalizer)
    training = TrainSettings(n_steps=2, batch_size=2)
    blind = replace(normal, pixels=torch.zeros_like(normal.pixels))
    lessons, dark = (
        Distillation(each, student_spec(SEEING, 4), training, teacher=teacher).solved(0)[1]
        for each in (normal, blind)
    )
    windows = batch_windows(len(data), 2, 0, 0)
    assert_close(lessons.condition, teacher.condition(data.records(windows, CONTRACT)), atol=1e-5)
    assert not torch.allclose(lessons.plan, dark.plan)


def fresh(spec: PolicySpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_network(spec).state_dict()


class Seer:
    """A robot that sees one record after the other."""

    def __init__(self, seen: np.ndarray) -> None:
        self.seen = iter(seen)

    def observe(self) -> np.ndarray:
        return next(self.seen)

    def apply(self, action: np.ndarray) -> None:
        pass

    def stop(self) -> None:
        pass


def test_a_loop_acts_on_pictures_and_its_recording_holds_them(tmp_path):
    policy, clock, seen = seeing(), VirtualClock(), records(3)
    controller = Controller(policy, 10.0, generator=5, planner=delayed(0.0), clock=clock)
    with DatasetRecorder(tmp_path / "run.zarr", SEEING, 4) as recorder:
        ControlLoop(controller, Seer(seen), observers=[recorder]).run(3)
    buffer = ReplayBuffer.open(tmp_path / "run.zarr")
    assert np.array_equal(buffer.read("img"), seen["img"])
    assert np.array_equal(buffer.read("observation"), seen["numbers"].astype(np.float32))
    plan = policy.plan(seen[[0, 0]], generator=torch.Generator().manual_seed(5))
    assert_close(torch.from_numpy(buffer.read("action")), plan.executed_actions[0, :3])


# ---------------------------------------------------------------------------------- PushT, and LeRobot's


def test_pushts_camera_shows_what_the_demonstrations_show(human_data):
    buffer, env = ReplayBuffer.open(human_data), gymnasium.make("paradiffpolicy/PushT-v0").unwrapped
    apart = []
    for step in (0, 100, 2000, 9000, 20000):
        seen = {name: buffer.read(name, step, step + 1) for name in ("img", "state", "action")}
        for episode in (seen, mirrored(seen)):
            env.reset(options={"state": episode["state"][0].astype(float)})
            apart.append(np.abs(episode["img"][0] - env.camera()).mean())
    assert max(apart[::2]) < 0.3 and max(apart[1::2]) < 0.7  # of 255; 0.26 and 0.57 were measured
    env.reset(seed=3)
    before = env.camera()
    env.step(np.array(env.hold_action))
    assert np.abs(before.astype(float) - env.camera()).mean() < 0.05  # the action's cross isn't seen


def test_an_environments_dicts_become_records():
    contract = Contract((ObservationField("state", 0, 2, shape=(5,)),), cameras=(Camera("img", (96, 96, 3)),))
    make = gymnasium.make("paradiffpolicy/PushT-v0", obs_type="image")
    env = RecordedEnv(make, contract, {"image": "img", "agent_pos": "state"})
    record, _ = env.reset(seed=1)
    assert record.dtype == contract.record_dtype(2)
    assert np.array_equal(record["numbers"], make.unwrapped.state[:2])
    assert np.array_equal(env.step(np.array([9.0, 9.0]))[0]["img"], make.unwrapped.camera())
    with pytest.raises(InputError, match="needs dicts"):
        RecordedEnv(gymnasium.make("paradiffpolicy/PushT-v0"), contract)
    with pytest.raises(InputError, match="no picture of camera 'img'"):
        RecordedEnv(make, contract, {"agent_pos": "state"}).reset(seed=1)


@pytest.mark.parametrize("capture", ["eager", "openvino"])
def test_lerobots_plans_from_pictures_are_ours(capture, lerobot_with_camera):
    folder, expected = lerobot_with_camera
    checkpoint = read_checkpoint(folder)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec)).captured(
        capture, precision="f32"
    )
    seen = np.zeros(expected["obs/observation.state"].shape[:2], checkpoint.spec.observation_dtype)
    seen["numbers"] = expected["obs/observation.state"]
    seen["observation.image"] = expected["obs/observation.image"].transpose(0, 1, 3, 4, 2)
    assert_close(policy.condition(seen), torch.tensor(expected["global_cond"]), atol=1e-5)
    n, x_T = policy.sampler.tableau.n_nodes, torch.tensor(expected["x_T"])
    z = torch.zeros(n, *x_T.shape)
    z[: len(expected["z"])] = torch.tensor(expected["z"])
    noise = Noise(x_T, z, torch.zeros(n, len(x_T)))
    sample = policy.executor.run(policy._inputs(policy.checked(seen), None), noise).sample
    assert_close(sample, torch.tensor(expected["sample_normalized"]), atol=1e-4)


@pytest.fixture(scope="module")
def lerobot_with_camera(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    given = fixtures("lerobot/0.4.4-image")
    folder = tmp_path_factory.mktemp("lerobot")
    for path in given.iterdir():
        shutil.copy(path, folder)
    run_script_file(given.parent / "make_weights.py", str(folder))
    return folder, dict(np.load(folder / "expected.npz"))


def test_the_condition_has_the_size_that_the_spec_says():
    policy = seeing()
    assert policy.condition(observations(2)).shape == (1, SEEING.condition_dim)
    assert math.prod(policy.condition(observations(2)).shape) == 2 * (2 + 32)
    assert isinstance(policy.model.whole, VisualNetwork)


def test_the_reading_of_a_steps_windows_is_timed_beside_the_step():
    settings = TrainSettings(1, batch_size=4, precision="float32")
    row = reading_rows(SEEING, settings, "cpu", MonotonicClock(), lambda: None)
    assert row["step_ms"]["n"] == row["windows_ms"]["n"] == 1
    low, middle, high = row["share"]
    assert 0 < low <= middle <= high

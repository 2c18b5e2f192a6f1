"""robomimic's files: written ones are read back, converted actions do the same, and every fault of a file
is named in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from paradiffpolicy.cli.main import main
from paradiffpolicy.data.formats.demonstration import Demonstration, check_poses
from paradiffpolicy.data.formats.env_args import EnvArgs
from paradiffpolicy.data.formats.robomimic import RobomimicFile, write_robomimic
from paradiffpolicy.data.formats.store import StoreFile, write_store
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError

from .conftest import tiny_checkpoint, toy_episode
from .test_data import BreakingStore, InterruptedWriteError

needs_robosuite = pytest.mark.skipif(find_spec("robosuite") is None, reason="robosuite isn't installed")

OLD_ARM = {
    "type": "OSC_POSE",
    "control_delta": True,
    "damping": 1,
    "kp": 150,
    "input_max": 1,
    "input_min": -1,
}
ARM = {"type": "OSC_POSE", "input_type": "delta", "input_ref_frame": "world", "gripper": {"type": "GRIP"}}


def env_args(arm=ARM, version="1.5.2", **kwargs) -> EnvArgs:
    config = arm if version < "1.5" else {"type": "BASIC", "body_parts": {"right": arm}}
    kwargs = {"robots": ["Panda"], "controller_configs": config, "control_freq": 20, **kwargs}
    return EnvArgs.parse(
        {"env_name": "Lift", "env_version": version, "type": 1, "env_kwargs": kwargs}, "here"
    )


def demonstration(name="demo_0", length=6, seed=0, **changes) -> Demonstration:
    """Numbers of the right shapes."""
    draw = np.random.default_rng(seed)
    poses = draw.uniform(-1, 1, (length, 7))
    made = Demonstration(
        name=name,
        actions=draw.uniform(-1, 1, (length, 7)),
        observations={
            "object": draw.normal(size=(length, 10)),
            "robot0_eef_pos": draw.normal(size=(length, 3)),
            "agentview_image": draw.integers(0, 255, (length, 4, 4, 3), dtype=np.uint8),
        },
        states=draw.normal(size=(length, 32)),
        poses=poses,
        rewards=draw.integers(0, 2, length).astype(np.float64),
        dones=draw.integers(0, 2, length),
        model=f"<mujoco model='{name} ü'/>",
    )
    return replace(made, **changes)


def assert_same(one: Demonstration, other: Demonstration) -> None:
    assert (one.name, one.model, list(one.observations)) == (
        other.name,
        other.model,
        list(other.observations),
    )
    for name in ("actions", "states", "poses", "rewards", "dones"):
        mine, others = getattr(one, name), getattr(other, name)
        assert (mine is None) == (others is None)
        if mine is not None:
            assert mine.dtype == others.dtype
            np.testing.assert_array_equal(mine, others)
    for key, values in one.observations.items():
        assert values.dtype == other.observations[key].dtype
        np.testing.assert_array_equal(values, other.observations[key])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """Eleven demonstrations, so that their order isn't the alphabet's."""
    path = tmp_path_factory.mktemp("whole") / "demo.hdf5"
    demos = [demonstration(f"demo_{k}", length=4 + k % 3, seed=k) for k in range(11)]
    masks = {"train": ["demo_0", "demo_2", "demo_10"], "valid": ["demo_1"]}
    write_robomimic(path, demos, env_args(), masks)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path, whole):
    path = tmp_path / "in" / "demo.hdf5"
    path.parent.mkdir()
    path.write_bytes(whole)
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, output, and the last line of errors."""
    code = main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, (out.err.rstrip("\n").splitlines() or [""])[-1]


# -------------------------------------------------------------------------------------- round trips

names_of_keys = st.lists(
    st.sampled_from(["object", "robot0_eef_pos", "robot1_eef_quat", "ft", "img"]), unique=True, min_size=1
)


@st.composite
def datasets(draw):
    """Demonstrations with the same fields, numbered with gaps, in order; and masks."""
    shapes = {key: draw(st.sampled_from([(), (1,), (4,), (3, 3, 3)])) for key in sorted(draw(names_of_keys))}
    dtypes = {key: draw(st.sampled_from(["f4", "f8", "u1"])) for key in shapes}
    numbers = sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=4)))
    has = {name for name in ("states", "poses", "rewards", "dones", "model") if draw(st.booleans())}
    demos = []
    for number in numbers:
        whole = demonstration(f"demo_{number}", length=draw(st.integers(1, 9)), seed=number)
        values = np.random.default_rng(number)
        seen = {
            key: (values.uniform(0, 255, (len(whole), *shape))).astype(dtypes[key])
            for key, shape in shapes.items()
        }
        # robomimic reads rewards and dones from every demonstration: the writer adds them.
        lacking = {name: None for name in ("states", "poses", "model") if name not in has}
        demos.append(replace(whole, observations=seen, **lacking))
    names = st.lists(st.sampled_from([demo.name for demo in demos]), unique=True, min_size=1)
    return demos, draw(st.dictionaries(st.sampled_from(["train", "valid", "20_percent"]), names))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(datasets())
def test_hdf5_to_zarr_to_hdf5_is_the_same(tmp_path_factory, dataset):
    demos, masks = dataset
    folder = tmp_path_factory.mktemp("trip")
    args = env_args()
    write_robomimic(folder / "a.hdf5", iter(demos), args, masks)
    first = RobomimicFile(folder / "a.hdf5")
    assert first.demos == [demo.name for demo in demos] and first.masks == masks
    assert first.env_args is not None and first.env_args.to_dict() == args.to_dict()
    for demo in demos:
        assert_same(first.read(demo.name), demo)
    attributes = {"env_args": args.to_dict(), "actions": "recorded", "demos": first.demos, "masks": masks}
    write_store(folder / "b.zarr", map(first.read, first.demos), attributes)
    store = StoreFile(folder / "b.zarr")
    assert store.env_args is not None
    write_robomimic(folder / "c.hdf5", map(store.read, store.demos), store.env_args, store.masks)
    again = RobomimicFile(folder / "c.hdf5")
    assert again.demos == first.demos and again.masks == masks
    assert again.env_args is not None and again.env_args.to_dict() == args.to_dict()
    for demo in demos:
        assert_same(again.read(demo.name), demo)
    assert sorted(path.name for path in folder.iterdir()) == ["a.hdf5", "b.zarr", "c.hdf5"]
    first.close(), again.close()


def test_the_command_goes_there_and_back(capsys, file, tmp_path):
    code, out, err = run(
        capsys, "convert", f"source={file}", f"out={tmp_path / 'a.zarr'}", "actions=recorded"
    )
    assert code == 0, err
    assert "11 demonstrations, 54 steps, actions recorded" in out
    assert run(capsys, "convert", f"source={tmp_path / 'a.zarr'}", f"out={tmp_path / 'b.hdf5'}")[0] == 0
    one, other = RobomimicFile(file), RobomimicFile(tmp_path / "b.hdf5")
    assert one.demos == other.demos == [f"demo_{k}" for k in range(11)] and one.masks == other.masks
    for name in one.demos:
        back, mine = other.read(name), one.read(name)
        # Absolute actions are the default.
        np.testing.assert_array_equal(back.actions, mine.poses)
        assert_same(replace(back, actions=mine.actions), mine)
    assert other.kind == "absolute" and one.kind == "delta"


def test_a_subset_with_some_keys(capsys, file, tmp_path):
    words = ["mask=train", "obs_keys=[object]", "actions=delta"]
    assert run(capsys, "convert", f"source={file}", f"out={tmp_path / 'a.zarr'}", *words)[0] == 0
    store = ReplayBuffer.open(tmp_path / "a.zarr")
    assert store.n_episodes == 3 and store.attributes["demos"] == ["demo_0", "demo_2", "demo_10"]
    assert store.attributes["masks"] == {"train": ["demo_0", "demo_2", "demo_10"]}
    assert store.fields == ["action", "dones", "object", "rewards", "states"]
    np.testing.assert_array_equal(store.episode(2)["action"], RobomimicFile(file).read("demo_10").actions)
    assert store.text("model", 2) == "<mujoco model='demo_10 ü'/>"


def test_absolute_actions_of_a_file_become_two_rows_per_rotation(capsys, file, tmp_path):
    from paradiffpolicy.envs.robosuite.rotation import absolute_action, pose_action

    assert run(capsys, "convert", f"source={file}", f"out={tmp_path / 'a.zarr'}")[0] == 0
    poses = RobomimicFile(file).read("demo_3").poses
    wide = ReplayBuffer.open(tmp_path / "a.zarr").episode(3)["action"]
    assert wide.shape == (len(poses), 10)
    np.testing.assert_array_equal(wide, absolute_action(poses))
    np.testing.assert_allclose(pose_action(wide), poses, atol=1e-12)
    # A store that states only its environment, as 'collect' writes it, becomes playable too.
    buffer = ReplayBuffer.create(tmp_path / "c.zarr", attributes={"env_args": env_args().to_dict()})
    buffer.append({"action": wide.astype(np.float32), "object": wide}, texts={"model": "<mujoco/>"})
    assert run(capsys, "convert", f"source={tmp_path / 'c.zarr'}", f"out={tmp_path / 'c.hdf5'}")[0] == 0
    made = RobomimicFile(tmp_path / "c.hdf5")
    np.testing.assert_allclose(made.read("demo_0").actions, poses, atol=1e-6)
    assert made.kind == "absolute" and made.read("demo_0").model == "<mujoco/>"


def test_other_environments_keep_their_actions(capsys, tmp_path, toy_store):
    out = tmp_path / "toy.hdf5"
    code, _, err = run(capsys, "convert", f"source={toy_store}", f"out={out}")
    assert code == 2 and "name the task, as task=lift" in err
    assert run(capsys, "convert", f"source={toy_store}", f"out={out}", "task=pusht")[0] == 0
    file = RobomimicFile(out)
    assert file.env_args is not None and file.env_args.env_name == "paradiffpolicy/PushT-v0"
    assert file.keys == ["keypoint", "n_contacts", "state"]
    np.testing.assert_array_equal(file.read("demo_1").actions, toy_episode(25, 1)["action"])
    assert run(capsys, "convert", f"source={out}", f"out={tmp_path / 'back.zarr'}")[0] == 0
    assert ReplayBuffer.open(tmp_path / "back.zarr").episode_ends.tolist() == [30, 55, 96]


def test_actions_of_a_store_have_the_environments_width(toy_store):
    with pytest.raises(InputError, match="data/action has 2 numbers per step, but OSC_POSE of Panda takes 7"):
        StoreFile(toy_store, env_args())


def test_a_file_has_all_that_robomimics_reader_needs(tmp_path):
    """Its SequenceDataset: these attributes, these types, numpy arrays of bytes as masks."""
    bare = demonstration("demo_7", rewards=None, dones=None)
    write_robomimic(tmp_path / "a.hdf5", [bare], env_args(), {"train": ["demo_7"]})
    with h5py.File(tmp_path / "a.hdf5", "r", swmr=False, libver="latest") as file:
        assert json.loads(file["data"].attrs["env_args"])["type"] == 1
        assert file["data"].attrs["total"] == 6 and list(file["data"]) == ["demo_7"]
        demo = file["data/demo_7"]
        assert demo.attrs["num_samples"] == 6 and isinstance(demo.attrs["model_file"], str)
        assert [elem.decode("utf-8") for elem in np.array(file["mask/train"][:])] == ["demo_7"]
        for key in ("actions", "rewards", "dones"):
            assert demo[key][()].astype("float32").shape[0] == 6
        assert demo["dones"][()].tolist() == [0, 0, 0, 0, 0, 1] and not demo["rewards"][()].any()
        assert demo["actions"].ndim == 2 and demo["actions_abs"].shape == (6, 7)
        assert demo["obs/agentview_image"].dtype == np.uint8 and demo["obs/object"].shape == (6, 10)


# ------------------------------------------------------------------------------------- environments


def test_control_delta_is_translated():
    kwargs, notes = env_args(OLD_ARM, "1.4.1", camera_names=["front"]).for_robosuite_1_5()
    arm = kwargs["controller_configs"]["body_parts"]["right"]
    assert (arm["input_type"], arm["input_ref_frame"], arm["damping_ratio"]) == ("delta", "world", 1)
    assert not {"control_delta", "damping"} & set(arm) and "camera_names" not in kwargs
    assert kwargs["lite_physics"] is False and kwargs["use_camera_obs"] is False
    assert len(notes) == 1 and "control_delta" in notes[0] and "input_type=delta" in notes[0]
    kwargs, _ = env_args(OLD_ARM | {"control_delta": False}, "1.2.0").for_robosuite_1_5()
    assert kwargs["controller_configs"]["body_parts"]["right"]["input_type"] == "absolute"
    # In the newer form too, where 1.5 would ignore it.
    newer = env_args({"type": "OSC_POSE", "control_delta": False})
    kwargs, notes = newer.for_robosuite_1_5()
    assert kwargs["controller_configs"]["body_parts"]["right"]["input_type"] == "absolute" and notes
    assert env_args().for_robosuite_1_5()[1] == []


@pytest.mark.parametrize("version", ["1.2.0", "1.4.1", "1.5.1"])
def test_kinds_of_actions(version):
    arm = OLD_ARM if version < "1.5" else ARM
    args = env_args(arm, version)
    assert args.kind == "delta" and args.action_dim == 7 and args.is_before_1_5 == (version < "1.5")
    absolute = args.with_kind("absolute")
    assert absolute.kind == "absolute" and args.kind == "delta", "the original isn't changed"
    assert absolute.with_kind("absolute") is absolute
    assert absolute.with_kind("delta").to_dict() == args.to_dict()
    again = EnvArgs.parse(json.dumps(absolute.to_dict()), "here")
    assert again.to_dict() == absolute.to_dict()
    assert env_args(arm, version, robots=["Panda", "Panda"]).action_dim == 14
    assert env_args(arm | {"type": "OSC_POSITION"}, version).action_dim == 4
    assert env_args(arm | {"type": "JOINT_POSITION"}, version).action_dim is None
    with pytest.raises(InputError, match="actions of OSC_POSITION can't be turned into absolute"):
        env_args(arm | {"type": "OSC_POSITION"}, version).with_kind("absolute")


def test_poses_relative_to_the_base_are_not_the_worlds():
    base = env_args(ARM | {"input_type": "absolute", "input_ref_frame": "base"})
    assert base.kind == "absolute" and base.with_kind("absolute") is not base
    (arm,) = base.with_kind("absolute").controllers
    assert arm["input_ref_frame"] == "world"
    assert "base frame" in base.describe()["controller"]


# -------------------------------------------------------------------------------------------- texts


def test_texts_and_attributes_of_a_store(tmp_path):
    path = tmp_path / "a.zarr"
    texts = ["<mujoco> grüße", "", "x" * 100_000]
    buffer = ReplayBuffer.create(path, attributes={"env_args": {"robots": ["Panda"]}, "n": 3})
    for seed, text in enumerate(texts):
        buffer.append(toy_episode(4, seed), texts={"model": text})
    buffer.close()
    again = ReplayBuffer.open(path, "r+")
    assert again.attributes == {"env_args": {"robots": ["Panda"]}, "n": 3} and again.texts == ["model"]
    assert [again.text("model", k) for k in range(3)] == texts
    with pytest.raises(InputError, match=r"has texts \['model'\], the episode has \[\]"):
        again.append(toy_episode(4))
    with pytest.raises(InputError, match="no meta/mode; did you mean 'model'"):
        again.text("mode", 0)
    zarr.open_group(path, mode="r+")["meta/model"].resize((50_000,))
    with pytest.raises(InputError, match="meta/model has no entries 16 to 100016"):
        again.text("model", 2)
    with pytest.raises(InputError, match="JSON"):
        ReplayBuffer.create(tmp_path / "b.zarr", attributes={"x": object()})
    assert not (tmp_path / "b.zarr").exists()


def test_an_append_with_texts_interrupted_anywhere_leaves_earlier_ones():
    points, finished = 0, False
    while not finished:
        memory = MemoryStore()
        store = BreakingStore(memory)
        buffer = ReplayBuffer.create(store, "toy")
        if points % 2:  # the texts' arrays exist, or don't yet
            buffer.append(toy_episode(3), texts={"model": "first"})
        kept = buffer.n_episodes
        store.writes_left = points
        try:
            buffer.append(toy_episode(4), texts={"model": "second"})
            finished = True
        except InterruptedWriteError:
            pass
        again = ReplayBuffer(zarr.open_group(memory, mode="r+"), "toy")
        assert again.n_episodes == kept + finished
        again.append(toy_episode(5), texts={"model": "third"})
        last = ReplayBuffer(zarr.open_group(memory, mode="r"), "toy")
        texts = [last.text("model", k) for k in range(last.n_episodes)]
        assert texts == ["first"] * kept + ["second"] * finished + ["third"]
        points += 1
    assert points > 12


# -------------------------------------------------------------------------------------------- info


def test_info_describes_files(capsys, file, tmp_path, toy_store):
    tiny_checkpoint().save(tmp_path / "tiny")
    assert run(capsys, "convert", f"source={file}", f"out={tmp_path / 'a.zarr'}")[0] == 0
    code, out, err = run(capsys, "info", file, tmp_path / "a.zarr", tmp_path / "tiny", toy_store)
    assert code == 0, err
    for part in (
        "4 to 6, 4.9 on average",
        "train (3), valid (1)",
        "OSC_POSE, delta, world frame",
        "OSC_POSE, absolute, world frame",
        "obs/agentview_image",
        "4 x 4 x 3",
        "uint8",
        "data/action",
        "texts per episode",
        "pusht",
        "data/keypoint",
    ):
        assert part in out, part
    rewards = [RobomimicFile(file).read(f"demo_{k}").rewards.any() for k in range(11)]
    assert out.count(f"{sum(rewards)} of 11") == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "nothing at"),
        (lambda folder: folder, "neither a dataset nor a checkpoint"),
        (
            lambda folder: (folder / "note.txt").write_text("hello") and folder / "note.txt",
            "not an HDF5 file",
        ),
        (lambda folder: (folder / "empty.hdf5").touch() or folder / "empty.hdf5", "not an HDF5 file"),
    ],
)
def test_info_refuses(capsys, tmp_path, make, message):
    code, out, err = run(capsys, "info", make(tmp_path))
    assert code == 2 and message in err and not out


# --------------------------------------------------------------------------------------- bad input


def edited(change):
    """Makes the words for a file changed by h5py."""

    def make(path):
        with h5py.File(path, "r+") as file:
            change(file)
        return []

    return make


def put(name, change):
    def replace_dataset(file):
        values = change(np.array(file[name]))
        del file[name]
        file[name] = values

    return edited(replace_dataset)


def with_value(index, value):
    def change(values):
        values[index] = value
        return values

    return change


def with_args(args):
    return edited(lambda file: file["data"].attrs.modify("env_args", json.dumps(args)))


NO_ABS = edited(lambda file: [file["data"][name].pop("actions_abs") for name in file["data"]])
BAD_ARM = env_args(ARM | {"type": "OSC_POSES"}).to_dict()


def both(*makes):
    return lambda path: [word for make in makes for word in make(path)]


BAD = {
    "cut in half": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and [],
        "is cut short",
    ),
    "not HDF5": (lambda path: path.write_text("{}") and [], "is not an HDF5 file"),
    "no data": (edited(lambda file: file.pop("data")), "no group data"),
    "no demos": (edited(lambda file: file.pop("data") and file.create_group("data")), "no demonstrations"),
    "a strange demo": (
        edited(lambda file: file.create_group("data/test")),
        "data/test isn't a demonstration",
    ),
    "env_args": (
        edited(lambda file: file["data"].attrs.modify("env_args", "{")),
        "env_args aren't robomimic's",
    ),
    "unknown controller": (with_args(BAD_ARM), "unknown controller 'OSC_POSES'; did you mean 'OSC_POSE'"),
    "no actions": (edited(lambda file: file.pop("data/demo_1/actions")), "demo_1 has no actions"),
    "action dimension": (
        put("data/demo_1/actions", lambda values: values[:, :6]),
        "demo_1/actions has 6 numbers per step, but OSC_POSE of Panda takes 7",
    ),
    "NaN actions": (
        put("data/demo_1/actions", with_value((2, 1), np.nan)),
        "demo_1/actions has NaN or infinity at step 2",
    ),
    "NaN observation": (
        put("data/demo_1/obs/object", with_value((1, 1), np.inf)),
        "demo_1/obs/object has NaN or infinity at step 1",
    ),
    "NaN pose": (put("data/demo_0/actions_abs", with_value((3, 0), np.nan)), "demo_0/actions_abs has NaN"),
    "a pose in mm": (
        put("data/demo_0/actions_abs", with_value((3, 0), 430)),
        "demo_0/actions_abs has a position of 430 m at step 3",
    ),
    "degrees": (
        put("data/demo_0/actions_abs", with_value((1, 5), 90)),
        "demo_0/actions_abs has a rotation vector of 90 rad at step 1",
    ),
    "a gripper in m": (
        put("data/demo_1/actions_abs", with_value((0, 6), -3)),
        "demo_1/actions_abs has a gripper command of 3 at step 0",
    ),
    "short states": (
        put("data/demo_1/states", lambda values: values[:-1]),
        "demo_1/states has 4 steps, actions have 5",
    ),
    "num_samples": (
        edited(lambda file: file["data/demo_1"].attrs.modify("num_samples", 9)),
        "has 5 actions but num_samples 9",
    ),
    "texts as numbers": (
        both(put("data/demo_0/obs/object", lambda values: b"x"), lambda path: ["obs_keys=[object]"]),
        "demo_0/obs/object holds text",
    ),
    "missing key": (
        lambda path: ["obs_keys=[robot0_eef_poz]"],
        "no obs/robot0_eef_poz; did you mean 'robot0_eef_pos'",
    ),
    "a key that one lacks": (
        edited(lambda file: file.pop("data/demo_1/obs/object")),
        "demo_1 has no obs/object",
    ),
    "unknown mask": (lambda path: ["mask=tain"], "no mask/tain; did you mean 'train'"),
    "a mask of others": (put("mask/valid", lambda values: np.array([b"demo_77"])), "names demo_77"),
    "an empty mask": (
        both(
            edited(lambda file: file.create_dataset("mask/none", data=np.array([], dtype="S"))),
            lambda path: ["mask=none"],
        ),
        "mask/none is empty",
    ),
    "no states": (
        both(NO_ABS, edited(lambda file: file.pop("data/demo_0/states"))),
        "demo_0 has no states",
    ),
    "no model": (
        both(NO_ABS, edited(lambda file: file["data/demo_0"].attrs.pop("model_file"))),
        "demo_0 has no model_file",
    ),
    "joint positions": (
        both(NO_ABS, with_args(env_args(ARM | {"type": "JOINT_POSITION"}).to_dict())),
        "actions of JOINT_POSITION can't be turned into absolute",
    ),
    "no source": (lambda path: path.unlink() or [], "no file at"),
    "actions": (lambda path: ["actions=abs"], "unknown actions 'abs'; did you mean 'absolute'"),
    "check": (lambda path: ["check=-1"], "check=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_refuses(capsys, tmp_path, file, case):
    make, message = BAD[case]
    words = make(file)
    if case == "a mask of others":
        words = ["mask=valid"]
    out = tmp_path / "out" / "a.zarr"
    code, said, err = run(capsys, "convert", f"source={file}", f"out={out}", *words)
    assert code == 2 and message in err and not said
    assert err.startswith("paradiffpolicy: ") and "Traceback" not in err
    if case not in ("actions", "check"):
        assert "demo.hdf5" in err
    assert not out.parent.exists() or not list(out.parent.iterdir()), "something half-written is left"


def test_existing_files_are_not_overwritten(capsys, tmp_path, file, toy_store):
    before = file.read_bytes()
    for source, out in ((toy_store, file), (file, toy_store)):
        code, _, err = run(capsys, "convert", f"source={source}", f"out={out}")
        assert code == 2 and "exists" in err
    assert file.read_bytes() == before and ReplayBuffer.open(toy_store).n_episodes == 3
    for word in (f"out={tmp_path / 'a.txt'}", "out=null"):
        assert run(capsys, "convert", f"source={file}", word)[0] == 2


def test_an_unfinished_hdf5_leaves_nothing(capsys, tmp_path, file):
    put("data/demo_9/actions", with_value((0, 0), np.nan))(file)
    out = tmp_path / "out" / "a.hdf5"
    code, _, err = run(capsys, "convert", f"source={file}", f"out={out}", "actions=recorded")
    assert code == 2 and "demo_9/actions" in err and not list(out.parent.iterdir())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, whole, share):
    path = tmp_path_factory.mktemp("cut") / "demo.hdf5"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=re.escape(str(path))):
        RobomimicFile(path)


def test_poses_of_two_arms_are_checked():
    good = np.zeros((3, 14))
    check_poses(good, "here")
    good[2, 8] = 2
    with pytest.raises(InputError, match="position of 2 m at step 2"):
        check_poses(good, "here")
    with pytest.raises(InputError, match="7 numbers per arm"):
        check_poses(good[:, :10], "here")


# ------------------------------------------------------------------------------------------ replay


@pytest.fixture(scope="module")
def lift(tmp_path_factory):
    """Ten random deltas in Lift, recorded as robomimic does."""
    from paradiffpolicy.envs.robosuite.env import observation_keys

    from .robosuite_envs import shared_env

    env = shared_env("lift", "delta")
    draw = np.random.default_rng(0)
    _, info = env.reset(seed=3)
    infos, actions = [], []
    for _ in range(10):
        action = draw.uniform(-1, 1, 7)
        action[6] = np.sign(action[6])
        infos.append(info)
        actions.append(action)
        info = env.step(action)[4]
    demo = Demonstration(
        name="demo_0",
        actions=np.stack(actions),
        observations={key: np.stack([i[key] for i in infos]) for key in observation_keys(1)},
        states=np.stack([i["states"] for i in infos]),
        model=env.simulation.model,
    )
    path = tmp_path_factory.mktemp("lift") / "lift.hdf5"
    write_robomimic(path, [demo], EnvArgs.parse(env.env_args, "lift"), {"train": ["demo_0"]})
    return path, env.simulation


@pytest.fixture(scope="module")
def absolute_lift():
    from .robosuite_envs import shared_env

    return shared_env("lift").simulation


@needs_robosuite
def test_absolute_actions_do_what_deltas_did_and_back(lift, absolute_lift):
    from paradiffpolicy.envs.robosuite.replay import follow, observations_at, to_deltas, to_poses

    path, simulation = lift
    demo = RobomimicFile(path).read("demo_0")
    assert follow(simulation, demo.model, demo.states, demo.actions).largest == 0
    poses = to_poses(simulation, demo.model, demo.states, demo.actions)
    # robosuite computes rotations of goals in float32.
    assert follow(absolute_lift, demo.model, demo.states, poses).largest < 1e-7
    np.testing.assert_allclose(
        to_poses(absolute_lift, demo.model, demo.states, poses), poses, atol=1e-12, rtol=0
    )
    deltas, clipped = to_deltas(simulation, demo.model, demo.states, poses)
    np.testing.assert_allclose(deltas, demo.actions, atol=1e-6)
    assert clipped == 0 and follow(simulation, demo.model, demo.states, deltas).largest < 1e-6
    far = poses.copy()
    far[4:6, 0] += 0.2
    deltas, clipped = to_deltas(simulation, demo.model, demo.states, far)
    assert clipped == 2 and deltas[4, 0] == 1
    again = observations_at(simulation, demo.model, demo.states, list(demo.observations))
    for key, values in demo.observations.items():
        np.testing.assert_allclose(again[key], values, atol=1e-12)


@needs_robosuite
def test_deltas_in_the_bases_frame_mean_the_same_poses(lift):
    """A base that stands turned: Panda's in Lift doesn't, so it is turned here."""
    from paradiffpolicy.envs.robosuite.replay import to_deltas, to_poses

    path, simulation = lift
    demo = RobomimicFile(path).read("demo_0")
    poses = to_poses(simulation, demo.model, demo.states, demo.actions)
    (part,) = [part for _, _, part in simulation._arms()]
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    origin = part.origin_pos, part.origin_ori
    part.input_ref_frame, part.origin_pos, part.origin_ori = "base", np.array([1.0, 2, 3]), turn
    try:
        deltas, _ = to_deltas(simulation, demo.model, demo.states, poses)
        part = simulation._arms()[0][2]
        np.testing.assert_allclose(
            to_poses(simulation, demo.model, demo.states, deltas)[:, :3], poses[:, :3], atol=1e-6
        )
    finally:
        part.input_ref_frame, (part.origin_pos, part.origin_ori) = "world", origin


@needs_robosuite
def test_the_command_replays(capsys, lift, tmp_path):
    path, _ = lift
    store, back = tmp_path / "lift.zarr", tmp_path / "back.hdf5"
    code, out, err = run(capsys, "convert", f"source={path}", f"out={store}")
    assert code == 0, err
    assert "played again" in out
    assert float(re.search(r"by at most (\S+) ", out)[1]) < 1e-7
    code, out, err = run(capsys, "convert", f"source={store}", f"out={back}", "actions=delta", "check=0")
    assert code == 0, err
    one, other = RobomimicFile(path), RobomimicFile(back)
    assert one.env_args is not None and other.env_args is not None
    assert other.env_args.to_dict() == one.env_args.to_dict() and one.masks == other.masks
    mine, others = one.read("demo_0"), other.read("demo_0")
    np.testing.assert_allclose(others.actions, mine.actions, atol=1e-6)
    assert_same(replace(others, actions=mine.actions, poses=None), mine)
    zarr.open(store)["data/action"][4, 0] += 0.2
    code, out, err = run(
        capsys, "convert", f"source={store}", f"out={tmp_path / 'far.hdf5'}", "actions=delta", "check=0"
    )
    assert code == 0, err
    assert "1 steps pursue goals farther away than a delta can say" in out


def as_1_4(path, out, **changes):
    """The same demonstration as robosuite 1.4 would have written it."""
    file = RobomimicFile(path)
    demo = file.read("demo_0")
    model = re.sub(r'"gripper0_right_', '"gripper0_', demo.model).replace("fixed_mount0", "mount0")
    model = model.replace("/assets/bases/", "/assets/mounts/").replace("robot0_right_center", "unknown")
    seen = {k: v for k, v in demo.observations.items() if k != "object"}
    seen["object"] = -demo.observations["object"]
    old = replace(demo, model=model, observations=seen, **changes)
    write_robomimic(out, [old], env_args(OLD_ARM, "1.4.1", mount_types="default"), {})
    return out


@needs_robosuite
def test_an_older_robosuites_file_is_replayed_and_its_differences_are_named(capsys, lift, tmp_path):
    path, simulation = lift
    demo = RobomimicFile(path).read("demo_0")
    old = as_1_4(path, tmp_path / "old.hdf5")
    code = main(["convert", f"source={old}", f"out={tmp_path / 'a.zarr'}"])
    said = capsys.readouterr()
    assert code == 0, said.err
    for line in (
        "control_delta are an older robosuite's",
        "no mount_types: left out",
        "was made with robosuite 1.4.1, and is read with 1.5",
        "demo_0/obs/object differs by up to",
    ):
        assert line in said.err, line
    assert "eef_pos differs" not in said.err and "played again" in said.out
    from paradiffpolicy.envs.robosuite.replay import to_poses
    from paradiffpolicy.envs.robosuite.rotation import pose_action

    wide = ReplayBuffer.open(tmp_path / "a.zarr").episode(0)["action"]
    poses = to_poses(simulation, demo.model, demo.states, demo.actions)
    np.testing.assert_allclose(pose_action(wide), poses, atol=1e-9)
    words = ["observations=states", "actions=delta", "check=0"]
    assert main(["convert", f"source={old}", f"out={tmp_path / 'b.hdf5'}", *words]) == 0
    new = RobomimicFile(tmp_path / "b.hdf5")
    for key, values in demo.observations.items():
        np.testing.assert_allclose(new.read("demo_0").observations[key], values, atol=1e-9)
    assert new.env_args is not None and new.env_args.env_version.startswith("1.5")


@needs_robosuite
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": np.zeros((10, 5))}, "a state of 5 numbers; the model has"),
        ({"states": np.zeros((10, 32))}, "they mean something else in this robosuite"),
        ({"actions": np.zeros((10, 8))}, "OSC_POSE of Panda takes 7"),
    ],
)
def test_a_meaningless_replay_is_refused(capsys, lift, tmp_path, changes, message):
    old = as_1_4(lift[0], tmp_path / "old.hdf5", **changes)
    code, out, err = run(capsys, "convert", f"source={old}", f"out={tmp_path / 'out' / 'a.zarr'}")
    assert code == 2 and message in err and "old.hdf5" in err and not out
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@needs_robosuite
def test_an_unknown_environment_is_refused(capsys, lift, tmp_path):
    path = tmp_path / "other.hdf5"
    args = EnvArgs.parse(env_args().to_dict() | {"env_name": "Lifd"}, "here")
    write_robomimic(path, [RobomimicFile(lift[0]).read("demo_0")], args, {})
    code, _, err = run(capsys, "convert", f"source={path}", f"out={tmp_path / 'a.zarr'}")
    assert code == 2 and "robosuite knows no environment 'Lifd'" in err and "other.hdf5" in err

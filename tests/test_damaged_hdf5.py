"""HDF5 files that are damaged, lie, lead elsewhere, or merely have more than is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paradiffpolicy.cli.main import main
from paradiffpolicy.collection.conversion import Conversion
from paradiffpolicy.data.formats import hdf5
from paradiffpolicy.data.formats.env_args import EnvArgs
from paradiffpolicy.data.formats.robomimic import RobomimicFile, write_robomimic
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError

from .conftest import load_script
from .test_damaged_data import MUTANTS, mutated, refused
from .test_formats import ARM, demonstration, env_args


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "demo.hdf5"
    write_robomimic(path, [demonstration(f"demo_{k}", seed=k) for k in range(2)], env_args(), {})
    return path.read_bytes()


@pytest.fixture
def file(tmp_path, whole):
    path = tmp_path / "demo.hdf5"
    path.write_bytes(whole)
    return path


def convert(path, *words):
    """Converts to a store beside the file, as recorded."""
    return ["convert", f"source={path}", f"out={path.with_name('out.zarr')}", "actions=recorded", *words]


def replaced(name, make):
    def change(file):
        del file[name]
        make(file, name)

    return change


def elsewhere(file, name):
    file.create_dataset(name, shape=(6, 7), dtype="f8", external=[("/etc/passwd", 0, 6 * 7 * 8)])


def virtual(file, name):
    layout = h5py.VirtualLayout(shape=(6, 7), dtype="f8")
    layout[:] = h5py.VirtualSource("other.hdf5", "x", shape=(6, 7))
    file.create_virtual_dataset(name, layout)


def lost_chunk(file, name):
    file.create_dataset(name, shape=(6, 7), dtype="f8", chunks=(2, 7))[:4] = 1


def bomb(file, name):
    made = file.create_dataset(name, shape=(6, 7), dtype="f8", chunks=(6, 7), compression="gzip")
    made.id.write_direct_chunk((0, 0), zlib.compress(bytes(2**20)))


def link(target):
    def make(file, name):
        file[name] = target

    return make


def dataset(*arguments, **options):
    return lambda file, name: file.create_dataset(name, *arguments, **options)


ACTIONS = "data/demo_1/actions"
BAD = {
    "a link to another file": (
        replaced(ACTIONS, link(h5py.ExternalLink("x.hdf5", "/y"))),
        "to nothing in this",
    ),
    "a soft link to one": (
        lambda file: (
            replaced(ACTIONS, link(h5py.SoftLink("/away/y")))(file),
            file.__setitem__("away", h5py.ExternalLink("x.hdf5", "/")),
        ),
        "to nothing in this file",
    ),
    "links in a circle": (replaced(ACTIONS, link(h5py.SoftLink("/" + ACTIONS))), "to nothing in this file"),
    "data in another file": (replaced("data", link(h5py.ExternalLink("x.hdf5", "/data"))), "no group data"),
    "values in another file": (replaced(ACTIONS, elsewhere), "keeps its values in other files"),
    "a virtual dataset": (replaced(ACTIONS, virtual), "keeps its values in other files"),
    "a lost chunk": (replaced(ACTIONS, lost_chunk), "has 2 of its 3 chunks"),
    "never written": (replaced(ACTIONS, dataset(shape=(6, 7), dtype="f8")), "never written, or is lost"),
    "a terabyte a step": (
        replaced(ACTIONS, dataset(shape=(6, 2**37), dtype="f8", chunks=(1, 2**20))),
        "at most are read",
    ),
    "more than memory": (
        replaced(ACTIONS, dataset(shape=(2**40, 7), dtype="f8", chunks=(2**10, 7))),
        "more than this machine's memory",
    ),
    "a bomb": (replaced(ACTIONS, bomb), "unpacks to more than its size"),
    "a single action": (replaced(ACTIONS, dataset(data=1.0)), "single value"),
    "flat actions": (replaced(ACTIONS, dataset(data=np.zeros(6))), "must be steps x numbers"),
    "no steps": (replaced(ACTIONS, dataset(data=np.zeros((0, 7)))), "must be steps x numbers"),
    "complex actions": (replaced(ACTIONS, dataset(data=np.zeros((6, 7), complex))), "holds complex128"),
    "actions of 128 bits": (
        replaced(ACTIONS, dataset(data=np.zeros((6, 7), np.longdouble))),
        "64 bits at most are read",
    ),
    "actions that are a group": (replaced(ACTIONS, lambda file, name: file.create_group(name)), "no actions"),
    "names that aren't text": (
        lambda file: file.move("data/demo_1/obs/object", b"data/demo_1/obs/o\xff"),
        "b'o\\xff', which isn't text",
    ),
    "a model that is a number": (
        lambda file: file["data/demo_1"].attrs.__setitem__("model_file", 3),
        "model_file isn't text",
    ),
    "num_samples in text": (
        lambda file: file["data/demo_1"].attrs.__setitem__("num_samples", "six"),
        "demo_1 can't be read",
    ),
    "deep env_args": (
        lambda file: file["data"].attrs.__setitem__("env_args", "[" * 50_000),
        "env_args aren't robomimic's",
    ),
    "env_args that are numbers": (
        lambda file: file["data"].attrs.__setitem__("env_args", np.zeros(3)),
        "env_args aren't robomimic's",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(monkeypatch, capsys, file, case):
    monkeypatch.setattr(hdf5, "HARMLESS", 0)
    change, message = BAD[case]
    with h5py.File(file, "r+") as opened:
        change(opened)
    line = refused(capsys, *convert(file))
    assert message in line and str(file) in line and not file.with_name("out.zarr").exists()


def test_a_file_that_is_open_for_writing_is_not_called_damaged(file):
    # Another process: HDF5 knows which files this one has open.
    script = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(file)], **pipes) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        with pytest.raises(InputError, match="is open for writing: wait until its writer has closed it"):
            RobomimicFile(file)
        writer.communicate(b"")
    RobomimicFile(file).close()


def test_what_is_not_needed_is_left_out_with_a_line(capsys, file):
    with h5py.File(file, "r+") as opened:
        for demo in ("demo_0", "demo_1"):
            opened[f"data/{demo}/obs/note"] = "text"
            opened[f"data/{demo}/obs/away"] = h5py.ExternalLink("gone.hdf5", "/x")
            opened[f"data/{demo}/obs/packed"] = h5py.SoftLink("/nowhere")
            opened[f"data/{demo}/obs/camera/image"] = np.zeros((6, 2))
        opened["mask/sets/train"] = np.array([b"demo_1"])
        opened["mask/away"] = h5py.ExternalLink("gone.hdf5", "/x")
        opened["data/demo_1/dones"][:]  # bool in one, numbers in the other
        dones = opened["data/demo_1/dones"][()].astype(bool)
        del opened["data/demo_1/dones"]
        opened["data/demo_1/dones"] = dones
    assert main(["info", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "demo_0/obs/note holds text, not numbers" in out and "is a link to nothing in this file" in out
    assert "sets/train (1)" in out
    assert main(convert(file)) == 0
    said = capsys.readouterr().err
    assert "obs/note holds text, not numbers: left out" in said and "obs/away is a link to nothing" in said
    assert "obs/camera/image is in a group of its own, which isn't read: left out" in said
    store = ReplayBuffer.open(file.with_name("out.zarr"))
    assert store.fields == sorted(
        [*RobomimicFile(file).keys, "action", "poses", "rewards", "states", "dones"]
    )
    np.testing.assert_array_equal(store.episode(1, ["dones"])["dones"], dones)
    words = convert(file, "obs_keys=[note]")
    words[2] = f"out={file.with_name('other.zarr')}"
    assert "demo_0/obs/note holds text" in refused(capsys, *words)
    assert main([*words[:-1], "mask=sets/train"]) == 0
    assert ReplayBuffer.open(file.with_name("other.zarr")).n_episodes == 1


@pytest.mark.parametrize("name", ["..", "a\\b", ".hidden", "zarr.json", "x" * 201])
def test_an_observation_that_no_field_can_be_called_is_named(capsys, file, name):
    with h5py.File(file, "r+") as opened:
        for demo in ("demo_0", "demo_1"):
            opened[f"data/{demo}/obs/{name}"] = np.zeros((6, 2))
    line = refused(capsys, *convert(file))
    assert f"demo_0 can't be in a store: {file.with_name('out.zarr')}: a field can't be called" in line
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert main(convert(file, "obs_keys=[object]")) == 0


def test_recorded_values_need_no_env_kwargs(capsys, file):
    with h5py.File(file, "r+") as opened:
        opened["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_version": "1.5.2", "type": 1})
    assert main(["info", str(file)]) == 0
    capsys.readouterr()
    assert main(convert(file)) == 0
    capsys.readouterr()
    words = [*convert(file)[:2], f"out={file.with_name('b.zarr')}", "actions=delta"]
    assert "env_args name no controller" in refused(capsys, *words)


# --------------------------------------------------------------------- what actions mean without env_args


def strip(path, **attributes):
    """Leaves the deltas, without their poses and env_args."""
    with h5py.File(path, "r+") as opened:
        del opened["data"].attrs["env_args"]
        for name, value in attributes.items():
            opened["data"].attrs[name] = value
        for demo in opened["data"].values():
            del demo["actions_abs"]


def test_actions_of_an_unknown_environment_are_not_taken_for_others(capsys, file):
    strip(file)
    out = f"out={file.with_name('out.zarr')}"
    for words in (["actions=absolute"], ["actions=delta"], []):
        line = refused(capsys, "convert", f"source={file}", out, *words)
        assert "doesn't say in which environment it was made" in line and "task=lift" in line
    assert main(convert(file)) == 0
    assert ReplayBuffer.open(file.with_name("out.zarr")).attributes["actions"] == "recorded"


def test_robosuites_own_recordings_say_what_their_actions_mean(file):
    info = env_args().env_kwargs | {"env_name": "Lift"}
    strip(file, env="Lift", env_info=json.dumps(info), repository_version="1.5.2")
    with RobomimicFile(file) as opened:
        assert opened.kind == "delta" and opened.env_args.to_dict() == env_args().to_dict()


def test_a_task_says_what_actions_mean_unless_they_contradict(file):
    strip(file)
    absolute = env_args(ARM | {"input_type": "absolute"})
    assert RobomimicFile(file, absolute).kind == "absolute"
    assert RobomimicFile(file, env_args()).kind == "delta"
    with h5py.File(file, "r+") as opened:
        for demo in opened["data"].values():
            demo["obs/robot0_eef_pos"][:] = [0, 0, 3]
    conversion = Conversion(RobomimicFile(file, absolute), to_store=True)
    with pytest.raises(
        InputError, match=r"robot0_eef_pos, so they aren't absolute poses: name the task with"
    ):
        next(conversion.demonstrations(["demo_0"]))


def test_the_named_task_describes_a_file(capsys, file):
    strip(file)
    words = ["convert", f"source={file}", f"out={file.with_name('out.zarr')}", "task=pusht"]
    assert "can't be made absolute" in refused(capsys, *words, "actions=absolute")
    assert main(words) == 0
    about = ReplayBuffer.open(file.with_name("out.zarr")).attributes
    assert about["actions"] == "recorded" and about["env_args"]["env_name"] == "paradiffpolicy/PushT-v0"


def test_an_environment_with_one_kind_of_actions_has_no_others(capsys, file):
    with h5py.File(file, "r+") as opened:
        opened["data"].attrs["env_args"] = json.dumps({"env_name": "PushT", "type": 2, "env_kwargs": {}})
    words = ["convert", f"source={file}", f"out={file.with_name('out.zarr')}"]
    assert "one kind of actions" in refused(capsys, *words, "actions=absolute")
    assert main(words) == 0


# --------------------------------------------------------------------------------------------- mutants


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutant=MUTANTS)
def test_a_mutated_file_is_read_or_refused(whole, tmp_path_factory, mutant):
    path = tmp_path_factory.mktemp("mutant") / "demo.hdf5"
    path.write_bytes(mutated(whole, mutant))
    try:
        load_script("fuzz").read_robomimic(path)
    except InputError as error:
        assert "\n" not in str(error)


SETTINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("OSC_POSE"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["robots", "controller_configs", "type", "body_parts", "arms", "right", "control_delta"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def understand(stated):
    args = EnvArgs.parse(json.dumps(stated), "here")
    yield lambda: args.kind
    yield lambda: args.action_dim
    yield args.describe
    yield lambda: args.with_kind("absolute")
    yield args.for_robosuite_1_5


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["env_name", "env_kwargs", "env_version", "type"]), SETTINGS),
    SETTINGS,
)
def test_env_args_are_understood_or_refused(values, config):
    kwargs = {"robots": ["Panda"], "controller_configs": config}
    for stated in (values, {"env_name": "Lift", "env_kwargs": kwargs, "env_version": "1.4.1"}):
        try:
            for use in understand(stated):
                try:
                    use()
                except InputError as error:
                    assert str(error).startswith("here")
        except InputError as error:
            assert str(error).startswith("here")

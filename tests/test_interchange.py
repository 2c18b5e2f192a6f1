"""Checkpoints of other projects: their plans come out, and nothing in them is run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paradiffpolicy as pdp
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.errors import InputError
from paradiffpolicy.interchange import torch_pickle
from paradiffpolicy.interchange.reading import read_checkpoint
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.types import Noise

from .conftest import assert_close, fixtures
from .foreign import SPEC, ckpt, ckpt_tensors, lerobot, weights

# ------------------------------------------------------------------------------------------ their plans

CASES = {
    "lerobot/0.3.3-state_env": 3e-5,
    "lerobot/0.4.4-state_env": 3e-5,
    "lerobot/0.4.4-state_env_ddim": 3e-5,
    "lerobot/0.4.4-state_env_odd": 1e-4,
    "diffusion_policy/lowdim": 3e-5,
    "diffusion_policy/lowdim_sample_noscale_k3": 3e-5,
}
"""How far a normalised plan may be off."""


def fixture(name: str) -> tuple[Path, dict[str, np.ndarray]]:
    folder = fixtures(name)
    path = next(folder.glob("*.ckpt"), folder)
    return path, dict(np.load(folder / "expected.npz")) if (folder / "expected.npz").exists() else {}


def solved(policy: Policy, window: torch.Tensor, expected: dict[str, np.ndarray]) -> torch.Tensor:
    """The normalised plan of the noise that the other project drew."""
    n, x_T = policy.sampler.tableau.n_nodes, torch.tensor(expected["x_T"])
    z = torch.zeros(n, *x_T.shape)
    z[: len(expected["z"])] = torch.tensor(expected["z"]) if expected["z"].size else z[:0]
    inputs = policy._inputs(policy.checked(window), None)
    return policy.executor.run(inputs, Noise(x_T, z, torch.zeros(n, len(x_T)))).sample


@pytest.mark.parametrize("capture", ["eager", "openvino"])
@pytest.mark.parametrize("name", CASES)
def test_plans_are_theirs(name, capture):
    path, expected = fixture(name)
    checkpoint = read_checkpoint(path)
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec))
    policy = policy.captured(capture, precision="f32")
    fields = [f"obs/{field.key}" for field in checkpoint.spec.contract.observation]
    parts = [expected["obs"]] if "obs" in expected else [expected[field] for field in fields]
    sample = solved(policy, torch.tensor(np.concatenate(parts, -1), dtype=torch.float64), expected)
    actions, steps = policy.action_normalizer.unnormalize(sample), checkpoint.spec.executed
    if "chunk" in expected:
        theirs = torch.tensor(expected["sample_normalized"])
        assert_close(sample, theirs, atol=CASES[name], rtol=0)
        chunk = torch.tensor(expected["chunk_normalized"])
        assert_close(sample[:, steps], chunk, atol=CASES[name], rtol=0)
    else:
        scale = policy.action_normalizer.scale.abs().max().item()
        theirs = torch.tensor(expected["action"])
        assert_close(actions[:, steps], theirs, atol=CASES[name] / scale, rtol=0)


def test_what_has_no_equal_is_refused_by_name():
    path, _ = fixture("diffusion_policy/lowdim_inpainting_refuse")
    with pytest.raises(
        InputError, match="obs_as_global_cond=False: conditioning by inpainting isn't supported"
    ):
        read_checkpoint(path)


def test_everything_of_ours_runs_on_an_imported_policy(tmp_path):
    path = lerobot(tmp_path / "theirs", noise_scheduler_type="DDIM", num_inference_steps=10)
    theirs = pdp.load_policy(path, sampler="native", capture="eager")
    assert theirs.sampler.keeps_epsilon and theirs.spec.first_executed is None
    window = torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = theirs.plan(window).actions
    parallel = {"solver": "ddim", "n_steps": 10, "keeps_epsilon": True, "driver": "picard", "window": 4}
    for capture in ("eager", "openvino"):
        sampler = parallel | {"tolerance": 1e-6}
        policy = pdp.load_policy(path, sampler=sampler, capture=capture, precision="f32", cache=None)
        assert_close(policy.plan(window).actions, expected, atol=1e-4, rtol=0)
    seen = {"observation.environment_state": [0.3, 0.4, 0.5], "observation.state": [0.1, 0.2]}
    assert torch.equal(theirs.plan(seen).actions, theirs.plan([0.1, 0.2, 0.3, 0.4, 0.5]).actions)


def test_epsilon_is_kept_as_diffusers_keeps_it():
    """On a network whose x0_hat is far beyond its bound."""
    diffusers = pytest.importorskip("diffusers")
    plain = [Normalizer(torch.ones(size), torch.zeros(size)) for size in (5, 2)]
    checkpoint = Checkpoint(SPEC, weights(), *plain, {})
    settings = {"solver": "ddim", "n_steps": 10, "keeps_epsilon": True}
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, **settings))
    scheduler = diffusers.DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler.set_timesteps(10)
    x = x_T = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1))
    condition = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        epsilon = policy.network(x, t.expand(3).float(), condition)
        x = scheduler.step(epsilon, t, x).prev_sample
    n = policy.sampler.tableau.n_nodes
    noise = Noise(x_T, torch.zeros(n, *x_T.shape), torch.zeros(n, 3))
    assert_close(policy.executor.run({"condition": condition}, noise).sample, x, atol=2e-5, rtol=0)
    with pytest.raises(InputError, match="keeps_epsilon=True must be true, with solver 'ddim', or false"):
        spec_sampler(SPEC, solver="ddpm", keeps_epsilon=True)


# ----------------------------------------------------------------------------------------- what is read


def test_a_file_of_diffusion_policy(tmp_path):
    checkpoint = read_checkpoint(ckpt(tmp_path / "epoch=1.ckpt"))
    spec = checkpoint.spec
    assert (spec.task, spec.obs_dim, spec.executed, spec.clip) == ("stacking", 5, slice(1, 5), 1.0)
    assert checkpoint.weights.keys() == weights().keys() and checkpoint.stored is torch.float32
    assert all(torch.equal(each, weights()[name]) for name, each in checkpoint.weights.items())
    assert checkpoint.action_normalizer.scale.tolist() == [0.5, 0.5]
    late = read_checkpoint(ckpt(tmp_path / "late.ckpt", policy__oa_step_convention=False)).spec
    assert late.executed == slice(2, 6)
    alone = {"policy__pred_action_steps_only": True, "policy__horizon": 4}
    assert read_checkpoint(ckpt(tmp_path / "alone.ckpt", **alone)).spec.executed == slice(0, 4)


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_lerobot(tmp_path, old):
    checkpoint = read_checkpoint(lerobot(tmp_path / "policy", old=old))
    assert checkpoint.weights.keys() == weights().keys()
    assert [field.key for field in checkpoint.spec.contract.observation] == [
        "observation.state",
        "observation.environment_state",
    ]
    raw = torch.tensor([3.0, 2.0, 7.0, 8.0, 9.0])  # the mapping has no ENV: the last three stay as they are
    observed = checkpoint.observation_normalizer.normalize(raw)
    assert_close(observed, torch.tensor([1.0, -1.0, 7.0, 8.0, 9.0]), atol=1e-6, rtol=0)
    action = checkpoint.action_normalizer.unnormalize(torch.tensor([2.0, -1.0]))
    assert_close(action, torch.tensor([2.0, -2.0]), atol=1e-6, rtol=0)


def test_convert_writes_ours(tmp_path, capsys):
    source, out = lerobot(tmp_path / "theirs"), tmp_path / "ours"
    assert main(["convert", f"source={source}", f"out={out}"]) == 0
    assert "M weights in float32" in capsys.readouterr().out
    ours, theirs = Checkpoint.load(out), read_checkpoint(source)
    assert ours == theirs
    assert main(["convert", f"source={source}", f"out={out}"]) == 2 and "exists" in capsys.readouterr().err
    assert main(["info", f"paths=[{source}]"]) == 0 and "lerobot" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- what is refused


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw_archive(path: Path, members: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # a name twice
        for name, content in members:
            archive.writestr(name, content)
    return path


def pickle_file(path: Path, pickled: bytes, **members: bytes) -> Path:
    others = [(f"archive/data/{key}", value) for key, value in members.items()]
    return raw_archive(path, [("archive/data.pkl", pickled), *others])


def tensor_pickle(count: int, size, stride, first: int = 0, dtype: str = "FloatStorage") -> bytes:
    """A pickle of one tensor on storage ``w``."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"\nX\x01\x00\x00\x00wX\x03\x00\x00\x00cpu"
    )
    storage += pickle.dumps(count, 2)[2:-1] + b"tQ"
    numbers = b"".join(pickle.dumps(each, 2)[2:-1] for each in (first, tuple(size), tuple(stride)))
    numbers = numbers.replace(b"q\x00", b"").replace(b"q\x01", b"")
    return b"\x80\x02" + rebuild + b"(" + storage + numbers + b"\x89NtR."


RAN = "a file was made by a checkpoint that was only read"

MALICIOUS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "posix": lambda mark: Calls(os.mkdir, str(mark)),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "getattr": lambda mark: Calls(getattr, Calls(dict), "update"),
    "import": lambda mark: Calls(__import__, "antigravity"),
    "path": lambda mark: Calls(Path, str(mark)),
    "namespace": lambda mark: SimpleNamespace(a=1),
    "torch.load": lambda mark: Calls(torch.load, str(mark)),
    "pickle": lambda mark: Calls(pickle.loads, b"cos\nsystem\n(S'true'\ntR."),
    "bytearray": lambda mark: Calls(bytearray, 2**40),
    "nested": lambda mark: {"deep": [{"er": Calls(os.system, f"touch {mark}")}]},
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_of_a_pickle_is_run(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    content = {"cfg": {}, "state_dicts": {}, "pickles": MALICIOUS[name](mark)}
    path = pickle_file(tmp_path / "evil.ckpt", pickle.dumps(content, protocol))
    with pytest.raises(InputError, match=r"which no policy needs: it isn't trusted|can't be read"):
        read_checkpoint(path)
    assert not mark.exists(), RAN


GLOBAL = b"cposix\nsystem\n"
DAMAGED_PICKLES = {
    "empty": b"",
    "no stop": b"\x80\x02]",
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "extension": b"\x80\x02\x82\x01.",
    "inst": b"(iposix\nsystem\n.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
    "string": b"\x80\x02T\xff\xff\xff\x7fa.",
    "bytes8": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "bytearray8": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00a.",
    "unhashable": b"\x80\x02}]K\x01s.",
    "underflow": b"\x80\x020.",
    "deep": b"(" * 10000 + b"t" * 10000 + b".",
    "latin": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "call an inert": b"\x80\x02comegaconf\nDictConfig\n)R" + GLOBAL + b"\x86R.",
    "persistent text": b"Pos.system\n.",
    "storage": b"\x80\x02(X\x07\x00\x00\x00storageK\x01tQ.",
    "not a mapping": pickle.dumps([1, 2, 3], 2),
    "no cfg": pickle.dumps({"state_dicts": {}}, 2),
    "cfg is text": pickle.dumps({"cfg": "policy", "state_dicts": {}}, 2),
    "2 GB declared": tensor_pickle(2**29, (2**29,), (1,)),
    "negative size": tensor_pickle(4, (-4,), (1,)),
    "beyond": tensor_pickle(4, (4,), (1,), first=1),
    "stride 0": tensor_pickle(4, (2**40,), (0,)),
    "stride": tensor_pickle(4, (2,), (2,)),
    "overflow": tensor_pickle(4, (2**40, 2**40), (1, 1)),
    "other dtype": tensor_pickle(4, (4,), (1,), dtype="QUInt8Storage"),
}


@pytest.mark.parametrize("name", DAMAGED_PICKLES)
def test_damaged_pickles_are_refused(tmp_path, name):
    path = pickle_file(tmp_path / "damaged.ckpt", DAMAGED_PICKLES[name], w=bytes(16))
    with pytest.raises(InputError) as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value) or "names" in str(raised.value)
    assert "\n" not in str(raised.value)


REASONS = {
    "memo": "beyond its own length",
    "extension": "the operation EXT1",
    "inst": "the operation INST",
    "bytearray8": "bytes in a bytearray8",
    "latin": "encoded in an unknown way",
    "storage": "not enough values to unpack",
    "2 GB declared": "doesn't have the 536870912 numbers that it declares",
    "negative size": "a tensor in it is malformed",
    "beyond": "more numbers than its storage",
    "stride 0": "more numbers than its storage",
    "stride": "isn't contiguous",
    "overflow": "more numbers than its storage",
    "other dtype": "names 'torch.QUInt8Storage'",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_pickle_is_refused_for_what_is_wrong_with_it(tmp_path, name):
    path = pickle_file(tmp_path / "damaged.ckpt", DAMAGED_PICKLES[name], w=bytes(16))
    with pytest.raises(InputError, match=re.escape(REASONS[name])):
        torch_pickle.TorchFile(path)


def test_a_tensor_is_read_from_its_place(tmp_path):
    numbers = torch.arange(4.0).numpy().tobytes()
    path = pickle_file(tmp_path / "good.ckpt", tensor_pickle(4, (3, 1), (1, 1), first=1), w=numbers)
    file = torch_pickle.TorchFile(path)
    assert file.read(file.content).tolist() == [[1.0], [2.0], [3.0]]


def test_parts_that_overlap_are_refused(tmp_path):
    """Two names for one part: a small file could stand for any amount of memory."""
    path = tmp_path / "overlap.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(10**5))
        again = copy.copy(archive.filelist[-1])
        again.filename = "archive/data/1"
        archive.filelist.append(again)
    with pytest.raises(InputError, match="its parts overlap"):
        torch_pickle.TorchFile(path)


def archives(folder: Path) -> dict[str, Path]:
    good = ckpt(folder / "good.ckpt").read_bytes()
    (folder / "text.ckpt").write_text("not a zip")
    (folder / "cut.ckpt").write_bytes(good[: len(good) // 2])
    os.mkfifo(folder / "fifo.ckpt")
    (folder / "folder.ckpt").mkdir()
    pickled = pickle.dumps({}, 2)
    bomb = [("archive/data.pkl", pickled), ("archive/data/0", bytes(2**24))]
    return {
        "text": folder / "text.ckpt",
        "cut": folder / "cut.ckpt",
        "fifo": folder / "fifo.ckpt",
        "folder": folder / "folder.ckpt",
        "bomb": raw_archive(folder / "bomb.ckpt", bomb, zipfile.ZIP_DEFLATED),
        "twice": raw_archive(folder / "twice.ckpt", [("archive/data.pkl", pickled)] * 2),
        "two": raw_archive(folder / "two.ckpt", [("a/data.pkl", pickled), ("b/data.pkl", pickled)]),
        "none": raw_archive(folder / "none.ckpt", [("archive/version", b"3")]),
        "order": raw_archive(
            folder / "order.ckpt", [("archive/data.pkl", pickled), ("archive/byteorder", b"big")]
        ),
    }


@pytest.mark.parametrize("name", ["text", "cut", "fifo", "folder", "bomb", "twice", "two", "none", "order"])
def test_damaged_archives_are_refused(tmp_path, name):
    with pytest.raises(InputError) as raised:
        read_checkpoint(archives(tmp_path)[name])
    assert "\n" not in str(raised.value)


UNKNOWN = {
    "another policy": {"policy___target_": "x.DiffusionUnetHybridImagePolicy"},
    "another policy's network": {"policy___target_": "x.DiffusionTransformerLowdimPolicy"},
    "local": {"policy__obs_as_local_cond": True},
    "inpainting": {"policy__obs_as_global_cond": False},
    "scheduler": {"policy__noise_scheduler___target_": "diffusers.PNDMScheduler"},
    "variance": {"policy__noise_scheduler__variance_type": "fixed_large"},
    "spacing": {"policy__noise_scheduler__timestep_spacing": "linspace"},
    "schedule": {"policy__noise_scheduler__beta_schedule": "sigmoid"},
    "prediction": {"policy__noise_scheduler__prediction_type": "flow"},
    "widths": {"policy__model__down_dims": [8, 32]},
    "widths of text": {"policy__model__down_dims": ["8"]},
    "horizon": {"policy__horizon": "8"},
    "huge": {"policy__horizon": 10**9},
    "missing": {"policy__obs_dim": None},
    "no cfg of a policy": {"policy": 3},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_options_without_an_equal_are_named(tmp_path, name):
    path = ckpt(tmp_path / "a.ckpt", **UNKNOWN[name])
    with pytest.raises(InputError) as raised:
        checkpoint = read_checkpoint(path)
        Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "act"}, "type='act': only diffusion policies are read"),
        ({"noise_scheduler_type": "UniPC"}, "DDPM and DDIM are known"),
        ({"normalization_mapping": {"STATE": "LOG", "ACTION": "MIN_MAX"}}, "STATE='LOG' isn't known"),
        ({"normalization_mapping": {"ACTION": "MIN_MAX"}}, "has no statistic action.min of 2 numbers"),
        (
            {"input_features": {"observation.image": {"type": "VISUAL", "shape": [3, 96]}}},
            "VISUAL \\[3, H, W\\]",
        ),
        ({"input_features": {}}, "one STATE and one ENV are known"),
        ({"n_groups": 3}, "n_groups|divisible|groups"),
        ({"down_dims": [16, 32]}, "don't fit"),
        ({"n_obs_steps": True}, "n_obs_steps=True isn't of the kind"),
        ({"horizon": 7}, "multiple"),
    ],
)
def test_lerobots_options_without_an_equal_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        checkpoint = read_checkpoint(lerobot(tmp_path / "policy", **changes))
        Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec))


def spoil(folder: Path, how: str) -> None:
    weights_file, config = folder / "model.safetensors", folder / "config.json"
    if how == "nan":
        stored = safetensors.torch.load_file(weights_file)
        stored["diffusion.unet.final_conv.1.bias"][0] = torch.nan
        safetensors.torch.save_file(stored, weights_file)
    elif how == "no weights":
        weights_file.unlink()
    elif how == "cut":
        weights_file.write_bytes(weights_file.read_bytes()[:1000])
    elif how == "header":
        weights_file.write_bytes(b"\xff" * 8 + weights_file.read_bytes()[8:])
    elif how == "fifo":
        weights_file.unlink()
        os.mkfifo(weights_file)
    elif how == "link":
        weights_file.rename(folder.parent / "elsewhere")
        weights_file.symlink_to(folder.parent / "elsewhere")
    elif how == "outside":
        step = {"registry_name": "normalizer_processor", "state_file": "../state.safetensors"}
        (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    elif how == "renamed":
        step = {"registry_name": "rename_observations_processor", "config": {"rename_map": {"a": "b"}}}
        (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    elif how == "json":
        config.write_text("[" * 100000)
    elif how == "list":
        config.write_text("[]")
    elif how == "binary":
        config.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "final_conv.1.bias' has values that aren't finite"),
        ("no weights", "model.safetensors is missing"),
        ("cut", "is no safetensors file"),
        ("header", "is no safetensors file"),
        ("fifo", "isn't a regular file"),
        ("link", "leads out of"),
        ("outside", "is missing"),
        ("renamed", "rename the observations yourself"),
        ("json", "can't be read"),
        ("list", "aren't a mapping"),
        ("binary", "can't be read"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, how, message):
    folder = lerobot(tmp_path / "policy")
    spoil(folder, how)
    with pytest.raises(InputError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("place", "fits"),
    [
        ("theirs/blobs/123", True),
        ("blobs/ab/123", True),
        ("others/blobs/123", False),
        ("theirs/snapshots/blobs/1", False),
    ],
)
def test_a_hubs_cache_may_link_to_its_blobs(tmp_path, place, fits):
    """To the repository's, and to those that all of the cache's repositories share."""
    folder, blob = lerobot(tmp_path / "theirs" / "snapshots" / "abc"), tmp_path / place
    blob.parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(f"../../../{place}")
    if fits:
        assert read_checkpoint(folder).weights.keys() == weights().keys()
        return
    with pytest.raises(InputError, match="leads out of"):
        read_checkpoint(folder)


MUTATION = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutated(content: bytes, changes) -> bytes:
    changed = bytearray(content)
    for where, new in changes:
        first = int(where * (len(changed) - 1))
        changed[first : first + len(new)] = new
    return bytes(changed)


@settings(QUICK, max_examples=150)
@given(changes=MUTATION, within=st.floats(0.01, 1))
def test_mutated_files_are_read_or_refused(tmp_path, changes, within):
    """Most mutations are of the pickle: it lies at the beginning."""
    path = tmp_path / "mutated.ckpt"
    good = ckpt(path).read_bytes()
    size = int(within * len(good))
    path.write_bytes(mutated(good[:size], changes) + good[size:])
    try:
        read_checkpoint(path)
    except InputError as error:
        assert "\n" not in str(error)


@settings(QUICK, max_examples=100)
@given(
    changes=MUTATION, name=st.sampled_from(["config.json", "model.safetensors", "policy_preprocessor.json"])
)
def test_mutated_folders_are_read_or_refused(tmp_path_factory, changes, name):
    folder = lerobot(tmp_path_factory.mktemp("fuzz") / "policy")
    (folder / name).write_bytes(mutated((folder / name).read_bytes(), changes))
    try:
        read_checkpoint(folder)
    except InputError as error:
        assert "\n" not in str(error)


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    """The optimizer's state and the weights that weren't averaged stay on disk."""
    path = tmp_path / "a.ckpt"
    ckpt(path)
    read: list[str] = []
    actual = torch_pickle.TorchFile.read

    def noted(self, tensor):
        read.append(tensor.storage.member)
        return actual(self, tensor)

    monkeypatch.setattr(torch_pickle.TorchFile, "read", noted)
    checkpoint = read_checkpoint(path)
    assert len(read) == len(checkpoint.weights) + 4


def test_a_policy_without_a_task_drives_the_one_that_is_named(tmp_path, capsys):
    """PushT, as LeRobot's environment observes it."""
    features = {
        "observation.state": {"type": "STATE", "shape": [2]},
        "observation.environment_state": {"type": "ENV", "shape": [16]},
    }
    settings = {"input_features": features, "normalization_mapping": {"ACTION": "MEAN_STD"}}
    folder = lerobot(tmp_path / "policy", tensors=weights(18), **settings)
    out = tmp_path / "report"
    command = (
        f"evaluate task=pusht_corners checkpoint={folder} samplers=[native,rti] reference=native seeds=1"
    )
    command += f" task.max_steps=8 videos=0 paced_ticks=0 latency_plans=0 capture=eager out={out}"
    assert main(command.split()) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["checkpoint"] == str(folder) and len(report["weights_sha256"]) == 64
    command = f"evaluate task=lift checkpoint={folder} samplers=[native] seeds=1 out={tmp_path / 'other'}"
    assert main(command.split()) == 2


def test_an_imported_policy_is_a_teacher(tmp_path, human_data, capsys):
    tensors = ckpt_tensors(20)
    source = ckpt(tmp_path / "theirs.ckpt", tensors, policy__obs_dim=20, task__name="pusht_lowdim")
    command = f"distill checkpoint={source} dataset={human_data} student={tmp_path / 'student'} nodes=4"
    command += f" run={tmp_path / 'run'} training.n_steps=2 training.batch_size=4 training.warmup_steps=1"
    assert main([*command.split(), "evaluation.seeds=0", "augmentation=null"]) == 0, capsys.readouterr().err
    student = Checkpoint.load(tmp_path / "student")
    assert student.spec.student_timesteps and student.stored is torch.float16
    assert len(student.info["teacher"]["sha256"]) == 64

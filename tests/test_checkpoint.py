"""Checkpoints: what is saved comes back, what is damaged is named, nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from paradiffpolicy import checkpoint as checkpoint_module
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.errors import InputError
from paradiffpolicy.files import located, write_atomically
from paradiffpolicy.policy import Policy

from .conftest import TINY, tiny_checkpoint


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("weights-*.safetensors")
    return file


def test_what_is_saved_comes_back(tmp_path):
    saved = tiny_checkpoint()
    saved.save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert loaded.spec == saved.spec and loaded.info == saved.info
    for name, value in saved.weights.items():
        assert torch.equal(loaded.weights[name], value.half().float())
    assert torch.equal(loaded.action_normalizer.scale, saved.action_normalizer.scale)
    text = (tmp_path / "policy.json").read_text()
    assert json.loads(text)["spec"]["down_dims"] == [16, 32]


def test_saving_again_replaces_everything(tmp_path):
    tiny_checkpoint(seed=0).save(tmp_path)
    tiny_checkpoint(seed=1).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    expected = tiny_checkpoint(seed=1).weights["final_conv.1.weight"].half().float()
    assert torch.equal(Checkpoint.load(tmp_path).weights["final_conv.1.weight"], expected)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_save_that_is_interrupted_leaves_the_old_policy(tmp_path, monkeypatch, writes):
    tiny_checkpoint(seed=0).save(tmp_path)
    left, real = [writes], Path.replace

    def replace(self, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        tiny_checkpoint(seed=1).save(tmp_path)
    monkeypatch.undo()
    expected = tiny_checkpoint(seed=0).weights["final_conv.1.weight"].half().float()
    assert torch.equal(Checkpoint.load(tmp_path).weights["final_conv.1.weight"], expected)
    assert not list(tmp_path.glob(".*"))


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def damage_weights(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-100])


def edit(change):
    def damage(folder):
        path = folder / "policy.json"
        metadata = json.loads(path.read_text())
        change(metadata)
        path.write_text(json.dumps(metadata))

    return damage


def nested(depth):
    return [nested(depth - 1)] if depth else 0


def replaced(path, make):
    path.unlink()
    make(path)


def rewritten(folder, old, new):
    path = folder / "policy.json"
    path.write_text(path.read_text().replace(old, new, 1))


def rewrite(folder, content):
    """Weights whose hash fits."""
    weights_file(folder).write_bytes(content)
    edit(lambda m: m["weights"].update(sha256=hashlib.sha256(content).hexdigest()))(folder)


def changed(folder, change):
    """The weights' file with one of them changed."""
    weights = safetensors.torch.load_file(weights_file(folder))
    weights["final_conv.1.bias"] = change(weights["final_conv.1.bias"]).contiguous()
    return safetensors.torch.save(weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "truncated or changed"),
        (lambda folder: weights_file(folder).unlink(), "is missing"),
        (lambda folder: (folder / "policy.json").unlink(), r"no checkpoint at .*has its policy\.json"),
        (lambda folder: (folder / "policy.json").write_text('{"format": 1, "spec"'), "can't be read"),
        (lambda folder: (folder / "policy.json").write_text("[1]"), "not a format-1 checkpoint"),
        (edit(lambda m: m.update(format=2)), "is of format 2, this version reads 1: install a newer one"),
        *((edit(lambda m, v=v: m.update(format=v)), "not a format-1") for v in (0, True, 1.0, "1", None, [])),
        (
            lambda folder: rewritten(folder, '"format": 1', '"format": 1, "format": 1'),
            "'format' stands there twice",
        ),
        (lambda folder: rewritten(folder, '"task"', '"task": "lift", "task"'), "'task' stands there twice"),
        (edit(lambda m: m.update(wieghts={})), "unknown 'wieghts'; did you mean 'weights'"),
        (edit(lambda m: m["weights"].update(sha512="")), "unknown 'sha512'"),
        (edit(lambda m: m["normalizers"].update(image={})), "unknown 'image'"),
        (edit(lambda m: m["normalizers"]["action"].update(ofset=[0, 0])), "a normalizer has no 'ofset'"),
        (edit(lambda m: m["spec"].update(schedule="x" * 10**4)), "unknown noise schedule"),
        (edit(lambda m: m["spec"].update(contract={"action_kind": "x" * 10**4})), "unknown action kind"),
        (edit(lambda m: m["spec"].pop("task")), "not a policy's description"),
        (edit(lambda m: m["spec"].update(colour="red")), "not a policy's description"),
        (edit(lambda m: m.pop("normalizers")), "not a policy's description"),
        (edit(lambda m: m["spec"].update(obs_dim=7)), "scale must be a list of 7 numbers"),
        (edit(lambda m: m["spec"].update(horizon=17)), "horizon=17 must be a multiple of 2"),
        (edit(lambda m: m["spec"].update(n_action_steps=16)), "n_action_steps=16"),
        (edit(lambda m: m["spec"].update(down_dims=[16, 64])), "weights don't fit"),
        (edit(lambda m: m["spec"].update(schedule="cosine")), "unknown noise schedule"),
        (edit(lambda m: m["weights"].update(file="gone.safetensors")), "is missing"),
        *(
            (edit(lambda m, file=file: m["weights"].update(file=file)), "must be a plain name")
            for file in (
                "../../etc/passwd",
                "a/b.safetensors",
                "",
                "..",
                3,
                None,
                "a\0.safetensors",
                "/dev/zero",
            )
        ),
        (edit(lambda m: m["weights"].update(sha256=0)), "weights.sha256=0 must be 64 hexadecimal digits"),
        (edit(lambda m: m.update(weights=[])), "weights must be a mapping, not list"),
        (edit(lambda m: m.update(spec=3)), "spec must be a mapping, not int"),
        (edit(lambda m: m.update(info=[1])), "info must be a mapping, not list"),
        (edit(lambda m: m["info"].update(training="x")), "training must be a mapping, not str"),
        (edit(lambda m: m["info"].update(a=nested(40))), "nested more than 32 deep"),
        (edit(lambda m: m["normalizers"]["action"].update(offset=[0.0])), "offset must be a list of 2"),
        (edit(lambda m: m["normalizers"]["action"].update(scale=[0, 1])), "scale has 0"),
        (edit(lambda m: m["normalizers"]["action"].update(scale=[math.nan, 1])), "scale has nan"),
        (edit(lambda m: m["normalizers"]["action"].update(scale=[10**400, 1])), "too large"),
        (edit(lambda m: m["normalizers"]["action"].update(scale=["1", 1])), "scale has '1'"),
        *(
            (edit(lambda m, name=name, value=value: m["spec"].update({name: value})), name)
            for name, value in [
                *(("obs_dim", value) for value in (0, -1, 2.0, "20", True, None, 10**9)),
                *(("n_train_steps", value) for value in (0, 10**9, math.nan)),
                *(("horizon", value) for value in (10**6, [16], "16")),
                *(("down_dims", value) for value in ([], [16, "32"], [16, -32], 16, "16", [10**7], [8] * 40)),
                *(("kernel_size", value) for value in (0, 4, 10**5)),
                *(("diffusion_step_embed_dim", value) for value in (1, 2, 15)),
                *(("n_groups", value) for value in (0, 3)),
                *(("clip", value) for value in (-1, math.nan, "1", False)),
                *(("control_hz", value) for value in (0, -10, math.inf, "10", None)),
                *(("condition_dropout", value) for value in (1, -0.5, "0")),
                *(("cond_predict_scale", value) for value in (1, "true", None)),
                *(("task", value) for value in (3, None, [])),
                *(("prediction", value) for value in (3, "speed")),
                *(("network", value) for value in ([], "unet2d")),
                ("network_options", [1]),
                *(("schedule_options", value) for value in ([1], None)),
                ("schedule", {}),
                ("contract", []),
                ("contract", {"observation": [{"key": "a", "shape": [19]}]}),
                ("contract", {"action_names": ["x"]}),
            ]
        ),
        *(
            (edit(lambda m, field=field: m["spec"].update(contract={"observation": [field]})), message)
            for field, message in [
                ({"key": 3}, "its key and unit must be text"),
                ({"key": "a", "shape": [10**9, 10**9]}, "too many numbers"),
                ({"key": "a", "start": 1.5}, "must be whole numbers"),
                ({"key": "a", "colour": "red"}, "contract is malformed"),
                ([], "contract is malformed"),
            ]
        ),
        (edit(lambda m: m["spec"].update(contract={"action_kind": []})), "unknown action kind"),
        (edit(lambda m: m["spec"].update(schedule_options={"time_scale": 1})), "has no option 'time_scale'"),
        (edit(lambda m: m["spec"].update(schedule="flow")), "'epsilon' leaves x_0 open"),
        (lambda folder: (folder / "policy.json").write_text("[" * 10**5), "can't be read"),
        (lambda folder: (folder / "policy.json").write_bytes(b"\xff\xfe{"), "can't be read"),
        (lambda folder: os.truncate(folder / "policy.json", 2**24 + 1), "the most that is read"),
        (lambda folder: replaced(folder / "policy.json", os.mkfifo), "isn't a regular file"),
        (lambda folder: replaced(weights_file(folder), os.mkfifo), "isn't a regular file"),
        (lambda folder: rewrite(folder, b"nonsense"), "is no safetensors file"),
        (lambda folder: rewrite(folder, b"\xff" * 64), "is no safetensors file"),
        (lambda folder: rewrite(folder, changed(folder, lambda w: w.fill_(math.nan))), "aren't finite"),
        (lambda folder: rewrite(folder, changed(folder, lambda w: w.fill_(math.inf))), r"final_conv.1.bias"),
        (lambda folder: rewrite(folder, changed(folder, lambda w: w.int())), "aren't finite numbers"),
        (
            lambda folder: rewrite(folder, changed(folder, lambda w: w.to(torch.complex64))),
            "aren't finite numbers",
        ),
        (lambda folder: rewrite(folder, safetensors.torch.save({"a\n" * 999: torch.ones(1)})), "is missing"),
        (
            lambda folder: rewrite(folder, changed(folder, lambda w: w[:1])),
            r"bias. is \(1,\), expected \(2,\)",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    tiny_checkpoint().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Policy.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_checkpoints_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_checkpoint().save(tmp_path / "own")
    assert Checkpoint.load(located("~/own")) == Checkpoint.load(located("own"))
    assert Checkpoint.load(located("checkpoints/lift")).spec.task == "lift"
    assert located("checkpoints/mine") == Path("checkpoints/mine")
    assert main(["info", "~/own"]) == 0


def test_a_name_that_no_file_can_have_is_no_checkpoint():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no checkpoint at"):
            Checkpoint.load(located(name))


def test_info_reads_descriptions_as_loading_does(tmp_path, capsys):
    tiny_checkpoint().save(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    edit(lambda m: m["info"].update(training=3))(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sizes_beyond_the_weights_take_no_memory(tmp_path):
    """A network of these widths has 10^12 numbers."""
    tiny_checkpoint().save(tmp_path)
    edit(lambda m: m["spec"].update(down_dims=[80_000, 80_000, 80_000]))(tmp_path)
    with pytest.raises(InputError, match="don't fit its spec"):
        Policy.load(tmp_path)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    tiny_checkpoint().save(tmp_path)
    before = Checkpoint.load(tmp_path)
    for value in (math.nan, 1e6):  # the second has no half
        broken = tiny_checkpoint(seed=1)
        broken.weights["final_conv.1.bias"].fill_(value)
        with pytest.raises(InputError, match=r"final_conv\.1\.bias isn't finite"):
            broken.save(tmp_path)
    assert Checkpoint.load(tmp_path) == before


@pytest.mark.parametrize("at", ["read_description", "reading", "_read_weights"])
def test_a_reader_that_races_its_writer_reads_the_old_or_the_new(tmp_path, monkeypatch, at):
    """The writer comes just before the description is read, the weights are looked for, or opened."""
    tiny_checkpoint().save(tmp_path)
    real, writers = getattr(checkpoint_module, at), [tiny_checkpoint(seed=1)]

    def late(*arguments):
        if writers:
            writers.pop().save(tmp_path)
        return real(*arguments)

    monkeypatch.setattr(checkpoint_module, at, late)
    expected = tiny_checkpoint(seed=1).weights["final_conv.1.weight"].half().float()
    assert torch.equal(Checkpoint.load(tmp_path).weights["final_conv.1.weight"], expected)


def test_a_published_state_dict_loads_unchanged():
    """A state dict by diffusion_policy's names, in any order, is all that a policy needs."""
    checkpoint = tiny_checkpoint()
    shuffled = dict(reversed(list(checkpoint.weights.items())))
    again = Checkpoint(TINY, shuffled, checkpoint.observation_normalizer, checkpoint.action_normalizer, {})
    from paradiffpolicy.sampling.sampler import make_sampler
    from paradiffpolicy.sampling.spec import spec_schedule

    sampler = make_sampler(spec_schedule(TINY), solver="ddim", n_steps=3)
    window = torch.rand(1, 2, 20) * 512
    plans = [
        Policy.from_checkpoint(c, sampler).plan(window, generator=torch.Generator().manual_seed(0)).actions
        for c in (checkpoint, again)
    ]
    assert torch.equal(*plans)

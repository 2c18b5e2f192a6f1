"""Checkpoints: what is saved comes back, what is damaged is named, nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.errors import InputError
from paradiffpolicy.files import write_atomically
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "truncated or changed"),
        (lambda folder: weights_file(folder).unlink(), "is missing"),
        (lambda folder: (folder / "policy.json").unlink(), r"no checkpoint at .*has its policy\.json"),
        (lambda folder: (folder / "policy.json").write_text('{"format": 1, "spec"'), "can't be read"),
        (lambda folder: (folder / "policy.json").write_text("[1]"), "not a format-1 checkpoint"),
        (edit(lambda m: m["spec"].pop("task")), "not a policy's description"),
        (edit(lambda m: m["spec"].update(colour="red")), "not a policy's description"),
        (edit(lambda m: m.pop("normalizers")), "not a policy's description"),
        (edit(lambda m: m["spec"].update(obs_dim=7)), "scale must be a list of 7 numbers"),
        (edit(lambda m: m["spec"].update(horizon=17)), "horizon=17 must be a multiple of 2"),
        (edit(lambda m: m["spec"].update(n_action_steps=16)), "n_action_steps=16"),
        (edit(lambda m: m["spec"].update(down_dims=[16, 64])), "weights don't fit"),
        (edit(lambda m: m["spec"].update(schedule="cosine")), "unknown noise schedule"),
        (edit(lambda m: m["weights"].update(file="../../etc/passwd")), "is missing"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    tiny_checkpoint().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Policy.load(tmp_path)


def test_a_published_state_dict_loads_unchanged():
    """A state dict by diffusion_policy's names, in any order, is all that a policy needs."""
    checkpoint = tiny_checkpoint()
    shuffled = dict(reversed(list(checkpoint.weights.items())))
    again = Checkpoint(TINY, shuffled, checkpoint.observation_normalizer, checkpoint.action_normalizer, {})
    from paradiffpolicy.policy import spec_schedule
    from paradiffpolicy.sampling.sampler import make_sampler

    sampler = make_sampler(spec_schedule(TINY), solver="ddim", n_steps=3)
    window = torch.rand(1, 2, 20) * 512
    plans = [
        Policy.from_checkpoint(c, sampler).plan(window, generator=torch.Generator().manual_seed(0)).actions
        for c in (checkpoint, again)
    ]
    assert torch.equal(*plans)

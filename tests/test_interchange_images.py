"""diffusion_policy's policies with cameras: their conditions and plans come out."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.errors import InputError
from paradiffpolicy.interchange import diffusion_policy_images as images
from paradiffpolicy.interchange.diffusion_policy import policy_name
from paradiffpolicy.interchange.reading import read_checkpoint
from paradiffpolicy.interchange.settings import Settings
from paradiffpolicy.interchange.torch_pickle import TorchFile
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.types import PolicySpec

from .conftest import assert_close
from .foreign import SPEC, weights
from .foreign_images import META, PUSHT, Hybrid, Images


def seen(meta=META, rows: int = 2) -> list[dict[str, np.ndarray]]:
    """Observations as cameras and sensors give them, one after the other."""
    draw = np.random.default_rng(0)

    def one(shape):
        if len(shape) == 1:
            return draw.uniform(-1, 1, shape)
        return draw.integers(0, 256, (*shape[1:], 3), dtype=np.uint8)

    return [{key: one(about["shape"]) for key, about in meta["obs"].items()} for _ in range(rows)]


def theirs(window: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The same as diffusion_policy takes them: channels first, and floats in [0, 1]."""
    stacked = {key: torch.tensor(np.stack([each[key] for each in window])) for key in window[0]}
    return {key: (x.movedim(-1, 1) / 255 if x.ndim == 4 else x).float() for key, x in stacked.items()}


ONE = {"obs": {key: META["obs"][key] for key in ("pose", "wrist")}, "action": META["action"]}
ENCODERS = {
    "hybrid": lambda: Hybrid(),
    "images": lambda: Images(),
    "hybrid, batch": lambda: Hybrid(group=False, crop=None, meta=ONE),
    "images, shared": lambda: Images(shared=True),
    "images, batch, larger": lambda: Images(
        False, imagenet=False, resize=(112, 104), crop=(83, 95), meta=ONE
    ),
    "images, smaller": lambda: Images(resize=(63, 50), crop=None, meta=ONE),
}
"""The first two have two cameras, whose names aren't in the order of the alphabet, and one network each."""


@pytest.mark.parametrize("name", ENCODERS)
def test_conditions_are_theirs(tmp_path, name):
    encoder = ENCODERS[name]()
    checkpoint = read_checkpoint(encoder.save(tmp_path / "a.ckpt"))
    policy = Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec))
    contract, window = policy.spec.contract, seen(encoder.meta)
    parts = encoder.parts(theirs(window))
    keys = [each.key for each in (*contract.observation, *contract.cameras)]
    assert sorted(keys) == sorted(parts)
    expected = torch.cat([parts[key] for key in keys], dim=-1).flatten()[None]
    assert (parts["wrist"][0] - parts["wrist"][1]).abs().max() > 1e-2  # pictures have an effect
    assert_close(policy.condition(window), expected, atol=1e-5, rtol=1e-5)
    if encoder.meta is META and not name.endswith("shared"):
        plans_are_theirs(policy, window, torch.cat(list(parts.values()), dim=-1))
    written = json.loads(json.dumps(asdict(policy.spec)))
    assert PolicySpec.from_dict(written).condition_dim == policy.spec.condition_dim


def plans_are_theirs(policy: Policy, window, condition: torch.Tensor) -> None:
    """Compares with a policy of their weights as they are, which observes the condition in their order."""
    size = condition.shape[1]
    plain = Normalizer(torch.ones(size), torch.zeros(size))
    spec = replace(SPEC, obs_dim=size, sampler=policy.spec.sampler)
    checkpoint = Checkpoint(spec, weights(size), plain, policy.action_normalizer, {})
    reference = Policy.from_checkpoint(checkpoint, spec_sampler(spec))
    expected = reference.plan(condition[None], generator=0).actions
    plan = policy.plan(window, generator=0)
    assert_close(plan.actions, expected, atol=1e-4, rtol=0)
    assert plan.executed == slice(1, 5)
    other = reference.plan(condition[None].flip(-1), generator=0).actions
    assert (other - expected).abs().max() > 1e-2


def described(encoder: Hybrid | Images, path: Path, **changes) -> PolicySpec:
    """What a config says, without weights."""
    file = TorchFile(encoder.save(path, tensors=dict.clear, **changes))
    return images.described(Settings(file.content["cfg"], str(path)))[0]


def test_what_a_config_says(tmp_path):
    spec = described(Hybrid(), tmp_path / "a.ckpt")
    contract = spec.contract
    assert [(each.key, each.shape) for each in contract.cameras] == [
        ("wrist", (97, 99, 3)),
        ("front", (90, 86, 3)),
    ]
    assert [(each.key, each.shape) for each in contract.observation] == [("pose", (3,)), ("grip", (1,))]
    assert (spec.task, spec.control_hz, contract.action_kind) == ("stacking", 20.0, "other")
    assert (spec.image_features, spec.obs_dim, spec.condition_dim) == (128, 4, 264)
    assert spec.first_executed is None and spec.encoder_options["crop"] == [84, 84]
    sizes = {"policy__obs_encoder__crop_shape": {"wrist": [80, 80], "front": [80, 80]}}
    assert described(Images(), tmp_path / "a.ckpt", **sizes).encoder_options["crop"] == [80, 80]


def test_pusht_from_pictures(tmp_path):
    spec = described(Images(meta=PUSHT), tmp_path / "a.ckpt", task__name="pusht_image")
    meaning = spec.contract.action_kind, spec.contract.action_names, spec.contract.action_unit
    assert (spec.task, spec.control_hz, meaning) == ("pusht_image", 10.0, ("position", ("x", "y"), "px"))
    assert [spec.contract.cameras[0].key, spec.contract.observation[0].key] == ["image", "agent_pos"]


ENCODER, RGB = "policy__obs_encoder__", "policy__obs_encoder__rgb_model__"
TRANSFORMER = "diffusion_policy.policy.x.DiffusionTransformerHybridImagePolicy"
VECTOR, PICTURE = {"pose": {"shape": [3]}}, {"front": {"shape": [3, 90, 90], "type": "rgb"}}
UNKNOWN = [
    (Hybrid, {"policy___target_": TRANSFORMER}, "HybridImagePolicy': .*DiffusionUnetImagePolicy are read"),
    (Hybrid, {"policy__eval_fixed_crop": False}, "eval_fixed_crop=False: random crops at run time"),
    (Hybrid, {"policy__obs_as_global_cond": False}, "obs_as_global_cond=False: conditioning by inpainting"),
    (Hybrid, {"policy__eta": 0.5}, "eta=0.5: this option isn't known"),
    (Hybrid, {"policy__shape_meta__obs": VECTOR}, "no observation is rgb"),
    (Hybrid, {"policy__shape_meta__obs": PICTURE}, "no observation is low_dim"),
    (Hybrid, {"policy__shape_meta__obs__wrist__type": "depth"}, "wrist=.*rgb .* and low_dim .* are known"),
    (Hybrid, {"policy__shape_meta__obs__wrist__shape": [4, 97, 99]}, "'wrist': shape=.97, 99, 4. must be"),
    (Hybrid, {"policy__shape_meta__action__shape": [2, 2]}, "action_dim=-1 must be"),
    (Hybrid, {"policy__noise_scheduler__variance_type": "learned"}, "variance_type='learned'"),
    (Images, {ENCODER + "_target_": "umi.TimmObsEncoder"}, "TimmObsEncoder': only MultiImageObsEncoder"),
    (Images, {ENCODER + "global_pool": "avg"}, "global_pool='avg': this option isn't known"),
    (Images, {ENCODER + "crop_shape": {"wrist": [80, 80], "front": [70, 80]}}, "only one size for all"),
    (Images, {ENCODER + "resize_shape": {}}, "only one size for all"),
    (Images, {ENCODER + "rgb_model": {"wrist": {}, "front": {}}}, "rgb_model: setting _target_ is missing"),
    (Images, {RGB + "name": "resnet50"}, "name='resnet50': only resnet18 is read"),
    (Images, {RGB + "_target_": "torchvision.models.vit"}, "only get_resnet is read"),
    (Images, {RGB + "norm_layer": "x"}, "norm_layer='x': this option isn't known"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), UNKNOWN)
def test_options_without_an_equal_are_named(tmp_path, kind, changes, message):
    path = kind().save(tmp_path / "a.ckpt", tensors=dict.clear, **changes)
    with pytest.raises(InputError, match=message) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


CORE, NORMALIZER = "obs_encoder.obs_nets.wrist.", "normalizer.params_dict."
SPOILED = {
    "missing": (
        lambda t: t.pop(CORE + "backbone.nets.4.0.conv1.weight"),
        "layer1.0.conv1.weight' is missing",
    ),
    "statistics": (lambda t: t.pop(CORE + "backbone.nets.1.running_var"), "bn1.running_var' is missing"),
    "another layer": (lambda t: t.update({CORE + "nets.5.weight": torch.ones(2)}), "expected none"),
    "another network": (lambda t: t.update({"obs_encoder.x.y": torch.ones(2)}), "obs_encoder.x.y.* none"),
    "size": (lambda t: t.update({CORE + "nets.3.weight": torch.ones(32, 64)}), r"is \(32, 64\), expected"),
    "nan": (lambda t: t.update({CORE + "nets.3.bias": torch.full((64,), torch.nan)}), "nets.3.bias' has val"),
    "temperature": (lambda t: t[CORE + "pool.temperature"].fill_(2), r"temperature is \[2.0\]: only 1"),
    "no range": (lambda t: t.pop(NORMALIZER + "wrist.scale"), "has no normalizer.params_dict.wrist.scale"),
    "range": (lambda t: t[NORMALIZER + "wrist.scale"].fill_(-1), r"'wrist' has the scale \[-1.0\]: only"),
    "ranges": (lambda t: t.update({NORMALIZER + "wrist.scale": torch.ones(3)}), "as many numbers each"),
    "no number": (lambda t: t[NORMALIZER + "pose.offset"].fill_(torch.nan), "'pose': dimension 0 of"),
    "numbers": (
        lambda t: t.update({NORMALIZER + "pose." + name: torch.ones(2) for name in ("scale", "offset")}),
        "the normalizer of 'pose' has 2 numbers, expected 3",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_a_file_lacks_is_named(tmp_path, name):
    change, message = SPOILED[name]
    path = Hybrid(group=False, meta=ONE).save(tmp_path / "a.ckpt", tensors=change)
    with pytest.raises(InputError, match=message) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_sizes_that_dont_fit_are_named(tmp_path):
    for encoder, message in (
        (Hybrid(crop=(100, 84)), r"crop=\[100, 84\] is larger than pictures of 'wrist'"),
        (Images(shared=True, crop=None), "cameras of different sizes share an encoder"),
    ):
        with pytest.raises(InputError, match=message):
            read_checkpoint(encoder.save(tmp_path / "a.ckpt"))


def places(values: dict) -> list[tuple[dict, str]]:
    """All settings: the mapping that each is in, and its name."""
    found = [(values, key) for key in values]
    for value in values.values():
        found += places(value) if isinstance(value, dict) else []
    return found


ODD = [None, -1, 0, 10**9, True, 2.5, float("nan"), "", "x", [], [0], [3, 0, 5], [2**40] * 3, {}, {1: 2}]


@pytest.mark.parametrize("encoder", [Hybrid, Images])
def test_odd_settings_are_read_or_refused(tmp_path, encoder):
    cfg = TorchFile(encoder(meta=ONE).save(tmp_path / "a.ckpt", tensors=dict.clear)).content["cfg"]
    for index in range(len(places(cfg))):
        for value in ODD:
            changed = copy.deepcopy(cfg)
            inside, key = places(changed)[index]
            inside[key] = value
            settings = Settings(changed, "a.ckpt")
            try:
                if policy_name(settings) in images.POLICIES:
                    images.described(settings)
            except InputError as error:
                assert "\n" not in str(error)

"""Writes checkpoints and datasets in the layouts of other projects, from their published names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import safetensors.torch
import torch
from torch import nn

from paradiffpolicy.models.networks import build_network
from paradiffpolicy.types import PolicySpec

SPEC = PolicySpec(
    "pusht_lowdim",
    obs_dim=5,
    action_dim=2,
    horizon=8,
    n_action_steps=4,
    down_dims=(8, 16),
    diffusion_step_embed_dim=8,
    n_groups=4,
)
THEIRS = "diffusion_policy.policy.diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy"


def weights(obs_dim: int = 5) -> dict[str, torch.Tensor]:
    """Of a network of ``SPEC``'s, for so many numbers observed."""
    torch.manual_seed(0)
    return dict(build_network(replace(SPEC, obs_dim=obs_dim)).state_dict())


def ckpt_tensors(obs_dim: int) -> dict[str, torch.Tensor]:
    """A policy's state dict as diffusion_policy has it."""
    tensors = {f"model.{name}": each for name, each in weights(obs_dim).items()}
    for part, size in (("obs", obs_dim), ("action", 2)):
        tensors[f"normalizer.params_dict.{part}.scale"] = torch.full((size,), 0.5)
        tensors[f"normalizer.params_dict.{part}.offset"] = torch.full((size,), 0.25)
    return tensors


def ckpt(path: Path, tensors=None, content=None, **changes) -> Path:
    """A file of diffusion_policy's layout; its config is a plain mapping, which omegaconf's would become."""
    cfg = {
        "policy": {
            "_target_": THEIRS,
            "model": {
                "_target_": "diffusion_policy.model.diffusion.conditional_unet1d.ConditionalUnet1D",
                "local_cond_dim": None,
                "down_dims": [8, 16],
                "diffusion_step_embed_dim": 8,
                "kernel_size": 5,
                "n_groups": 4,
                "cond_predict_scale": True,
            },
            "noise_scheduler": {
                "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
                "num_train_timesteps": 100,
                "beta_schedule": "squaredcos_cap_v2",
                "variance_type": "fixed_small",
                "clip_sample": True,
                "prediction_type": "epsilon",
            },
            "horizon": 8,
            "obs_dim": 5,
            "action_dim": 2,
            "n_action_steps": 4,
            "n_obs_steps": 2,
            "num_inference_steps": 100,
            "obs_as_local_cond": False,
            "obs_as_global_cond": True,
            "pred_action_steps_only": False,
            "oa_step_convention": True,
        },
        "training": {"use_ema": True},
        "task": {"name": "stacking"},
    }
    for name, value in changes.items():
        place = cfg
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        if value is None and last != "local_cond_dim":
            del place[last]
        else:
            place[last] = value
    tensors = tensors or ckpt_tensors(5)
    payload = {"cfg": cfg, "state_dicts": {"model": {}, "ema_model": tensors}, "pickles": {"epoch": b"\x80"}}
    torch.save(payload if content is None else content, path, pickle_protocol=2)
    return path


class ReferenceTransformer(nn.Module):
    """diffusion_policy's transformer with observations as its condition, of PyTorch's own layers.  Its
    weights are far from initial ones, which hardly look at anything."""

    def __init__(
        self, obs_dim=5, action_dim=2, horizon=8, n_obs_steps=2, width=16, causal=True, n_cond_layers=0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._dummy_variable = nn.Parameter()
        self.input_emb, self.cond_obs_emb = nn.Linear(action_dim, width), nn.Linear(obs_dim, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, horizon, width))
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, 1 + n_obs_steps, width))
        settings = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.1}
        shape = (width, 2, 4 * width)
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        if n_cond_layers:
            layer = nn.TransformerEncoderLayer(*shape, **settings)
            self.encoder = nn.TransformerEncoder(layer, n_cond_layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*shape, **settings), 2)
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, action_dim)
        self.mask = self.memory_mask = None
        if causal:
            later = torch.ones(horizon, horizon, dtype=torch.bool).triu(1)
            ahead = torch.ones(horizon, 1 + n_obs_steps, dtype=torch.bool).triu(2)
            del self.mask, self.memory_mask
            for name, hidden in (("mask", later), ("memory_mask", ahead)):
                self.register_buffer(name, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))
        for weight in self.parameters():
            weight.requires_grad_(False).add_(0.3 * torch.randn(weight.shape))
        self.eval()

    def forward(self, sample, timestep, condition):
        half = self.pos_emb.shape[-1] // 2
        angles = timestep[:, None] / 10000 ** (torch.arange(half) / (half - 1))
        time = torch.cat((angles.sin(), angles.cos()), dim=-1)[:, None]
        observations = self.cond_obs_emb(condition.unflatten(1, (self.cond_pos_emb.shape[1] - 1, -1)))
        memory = self.encoder(torch.cat((time, observations), dim=1) + self.cond_pos_emb)
        x = self.input_emb(sample) + self.pos_emb
        x = self.decoder(x, memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.head(self.ln_f(x))


def transformer_ckpt(path: Path, network: ReferenceTransformer | None = None, **changes) -> Path:
    """A file of a policy with that network, of its sizes by default."""
    tensors = {name: each for name, each in ckpt_tensors(5).items() if name.startswith("normalizer.")}
    network = network or ReferenceTransformer()
    tensors |= {f"model.{name}": each for name, each in network.state_dict().items()}
    settings = {
        "policy___target_": THEIRS.replace("unet", "transformer").replace("Unet", "Transformer"),
        "policy__model": {
            "_target_": "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion",
            "input_dim": 2,
            "output_dim": 2,
            "horizon": 8,
            "n_obs_steps": 2,
            "cond_dim": 5,
            "n_layer": 2,
            "n_head": 2,
            "n_emb": 16,
            "p_drop_emb": 0.0,
            "p_drop_attn": 0.3,
            "causal_attn": True,
            "time_as_cond": True,
            "obs_as_cond": True,
            "n_cond_layers": 0,
        },
        "policy__obs_as_cond": True,
        **dict.fromkeys(
            ("policy__obs_as_global_cond", "policy__obs_as_local_cond", "policy__oa_step_convention")
        ),
    }
    return ckpt(path, tensors, **(settings | changes))


def lerobot(folder: Path, old: bool = False, tensors=None, **changes) -> Path:
    """A folder of LeRobot's layout: of 0.4 and later, or (``old``) of 0.3."""
    folder.mkdir(parents=True)
    config = {
        "type": "diffusion",
        "n_obs_steps": 2,
        "horizon": 8,
        "n_action_steps": 4,
        "input_features": {
            "observation.environment_state": {"type": "ENV", "shape": [3]},
            "observation.state": {"type": "STATE", "shape": [2]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
        "normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MEAN_STD"},
        "down_dims": [8, 16],
        "kernel_size": 5,
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "use_film_scale_modulation": True,
        "noise_scheduler_type": "DDPM",
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_inference_steps": None,
    }
    config |= changes
    (folder / "config.json").write_text(json.dumps(config))
    stored = {f"diffusion.unet.{renamed(name)}": each for name, each in (tensors or weights()).items()}
    state = {"min": torch.tensor([-1.0, 2.0]), "max": torch.tensor([3.0, 2.0])}
    action = {"mean": torch.tensor([1.0, 2.0]), "std": torch.tensor([0.5, 4.0])}
    if old:
        stored |= {f"normalize_inputs.buffer_observation_state.{k}": v for k, v in state.items()}
        stored |= {f"unnormalize_outputs.buffer_action.{k}": v for k, v in action.items()}
    else:
        values = {f"observation.state.{k}": v for k, v in state.items()}
        values |= {f"action.{k}": v for k, v in action.items()}
        safetensors.torch.save_file(values, folder / "state.safetensors")
        step = {"registry_name": "normalizer_processor", "config": {}, "state_file": "state.safetensors"}
        (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "p", "steps": [step]}))
    safetensors.torch.save_file(stored, folder / "model.safetensors")
    return folder


def renamed(name: str) -> str:
    """A weight's name as LeRobot has it."""
    for k in (0, 1):
        name = name.replace(f".blocks.{k}.block.", f".conv{k + 1}.block.")
    parts = name.split(".")
    return name.replace(".2.conv.", ".2.") if parts[0] in ("down_modules", "up_modules") else name


def box(*shape: int) -> dict:
    """Gymnasium's Box as Minari's metadata have it."""
    return {"type": "Box", "dtype": "float32", "shape": shape, "low": -1.0, "high": 1.0}


def nested(observations, last: bool = True):
    """Minari's observations and their space, of keys in which "/" divides Dicts; with the last one, after
    which nothing is done."""
    if not isinstance(observations, dict):
        values = np.asarray(observations)
        return (np.concatenate((values, values[-1:])) if last else values), box(*values.shape[1:])
    values, spaces = {}, {}
    for key, inner in observations.items():
        values[key], spaces[key] = nested(inner, last)
    return values, {"type": "Dict", "subspaces": spaces}


def minari(folder: Path, episodes, change=None, env=None, last: bool = True, **metadata) -> Path:
    """A folder of Minari's layout.

    Args:
        episodes: ``(observations, actions, rewards)``; observations are an array, or a dict of such.
        change: is given the open file at the end.
        env: the environment's id and settings.
        metadata: in place of what ``metadata.json`` would say.
    """
    (folder / "data").mkdir(parents=True)
    space, steps = {}, 0
    with h5py.File(folder / "data/main_data.hdf5", "w", track_order=True) as file:
        for index, (observations, actions, rewards) in enumerate(episodes):
            values, space = nested(observations, last)
            group = file.create_group(f"episode_{index}")
            group.attrs.update({"id": index, "seed": 7 + index, "total_steps": len(actions)})
            put(group, "observations", values)
            ends = np.arange(len(actions)) == len(actions) - 1
            fields = {
                "actions": actions,
                "rewards": rewards,
                "terminations": ends,
                "truncations": ends & False,
            }
            for name, each in fields.items():
                put(group, name, np.asarray(each))
            group.create_group("infos")
            steps += len(actions)
        if change is not None:
            change(file)
    about = {"total_episodes": index + 1, "total_steps": steps, "data_format": "hdf5"}
    about |= {"observation_space": json.dumps(space), "action_space": json.dumps(box(2))}
    about |= {} if env is None else {"env_spec": json.dumps(env)}
    (folder / "data/metadata.json").write_text(json.dumps(about | metadata))
    return folder


def put(group: h5py.Group, name: str, values) -> None:
    """An array that can grow, or a group of such."""
    if isinstance(values, dict):
        for key, inner in values.items():
            put(group.require_group(name), key, inner)
    else:
        group.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))

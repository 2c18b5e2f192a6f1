"""The console command: every config, every command on real input, and every kind of bad input."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from paradiffpolicy import __version__
from paradiffpolicy.benchmarks.baselines import BASELINES
from paradiffpolicy.cli.bench import per_network
from paradiffpolicy.cli.building import EXTRAS, load_policy, named_sampler, sampling_policy
from paradiffpolicy.cli.composing import check, compose, task_files
from paradiffpolicy.cli.environments import AUGMENTATIONS, contract, env_maker
from paradiffpolicy.cli.main import COMMANDS, main
from paradiffpolicy.cli.schema import SCHEMAS, CaseConfig
from paradiffpolicy.cli.settings import settings_of
from paradiffpolicy.cli.train import train
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.diffusion.schedule import NoiseSchedule
from paradiffpolicy.environment import control_rate, make_env
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.statistics import paired_difference
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.presets import preset, presets, recipes
from paradiffpolicy.provenance import programs
from paradiffpolicy.recorded_env import RecordedEnv
from paradiffpolicy.sampling.sampler import make_sampler
from paradiffpolicy.task import NUMBERS, contract_size

from .conftest import ROOT, TINY, tiny_checkpoint
from .robosuite_envs import shared_env

SCHEDULE = NoiseSchedule.named("squared_cosine", 100)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def checkpoint(tmp_path) -> str:
    tiny_checkpoint().save(tmp_path / "tiny")
    return f"checkpoint={tmp_path / 'tiny'}"


FAST = [
    *("samplers=[ddim,rti]", "reference=ddim", "seeds=2", "task.max_steps=16", "paced_ticks=3"),
    "capture=eager",
]


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_explains_each_of_its_settings(command):
    config = compose(command, [])
    assert type(config) is SCHEMAS[command]
    assert [setting.name for setting in settings_of(config) if not setting.rule.help] == []


def test_every_sampler_can_be_built():
    for name in presets():
        make_sampler(SCHEDULE, **preset(name))
    with pytest.raises(InputError, match="unknown sampler 'rt'; did you mean 'rti'"):
        preset("rt")
    with pytest.raises(InputError, match="unknown sampler"):
        preset([])


@pytest.mark.parametrize("name", sorted(task_files()))
def test_every_task_agrees_with_its_environment(name):
    cfg = compose("evaluate", [f"task={name}"])
    fields = contract(cfg.task).observation
    env = env_maker(cfg)() if name.startswith("pusht") else shared_env(cfg.task.variant_of or name)
    if cameras := contract(cfg.task).cameras:
        env = RecordedEnv(env, contract(cfg.task), cfg.task.env.renamed)
    observation, info = env.reset(seed=0)
    observation = observation[NUMBERS] if cameras else observation
    assert observation.shape == (contract_size(fields),)
    assert env.action_space.shape == (len(cfg.task.action.names),)
    assert control_rate(env) == cfg.task.control_hz
    assert set(cfg.task.record) <= set(info)
    # The demonstrations' fields make up what the environment observes.
    assert all(np.shape(info[field.key]) == field.shape for field in fields)
    np.testing.assert_allclose(contract(cfg.task).vector(info), observation)


def test_samplers_can_be_changed_and_added():
    cfg = compose("evaluate", ["sampler.paraddpm.window=50", "+sampler.mine={solver: ddim, n_steps: 20}"])
    assert cfg.sampler["paraddpm"]["window"] == 50 and cfg.sampler["mine"]["n_steps"] == 20


def test_one_value_is_a_list_of_one_and_a_blending_is_named_by_its_name():
    cfg = compose("evaluate", ["samplers=ddim", "realtime.blending=rtc", "+realtime.blending.overlap=3"])
    assert cfg.samplers == ["ddim"] and cfg.realtime.blending == {"name": "rtc", "overlap": 3}
    assert compose("evaluate", ["samplers=ddim,rti"]).samplers == ["ddim", "rti"]


MINE = """
env: {id: "reach_env:Reach-v0", kwargs: {goal: 3}}
control_hz: 20
observation:
  - {key: hand, shape: [2], unit: m}
dataset: reach.zarr
"""


def test_a_task_is_a_file_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "reach.yaml").write_text(MINE)
    (folder / "reach.zarr").mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", ["task=./tasks/reach.yaml", "task.max_steps=16"])
    assert cfg.task.name == "reach" and cfg.task.env.kwargs == {"goal": 3} and cfg.task.max_steps == 16
    assert cfg.dataset == "tasks/reach.zarr" and cfg.task.workers == 1 and cfg.task.augmentation is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_step: 3", "there is no setting 'max_step'; did you mean 'max_steps'?"),
        ("env: {name: x}", "env has no setting 'name'"),
        ("max_steps: many", "max_steps=many must be a whole number above 0"),
        ("observation: [{shape: [2]}]", "key must be given"),
        ("action: {kind: pos}", "action.kind: unknown kind 'pos'; did you mean 'pose'?"),
        ("[1, 2]", "must hold names and values"),
        ("a: [", "can't be read as YAML"),
        ("a: " + "[" * 3000, "can't be read as YAML"),
        ("a: &a [*a]", "can't be read as YAML"),
        ("name: toy\n" + "#" * 2**16, "bytes, 65536 are the most that is read"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{k + 1}: &a{k + 1} [{f'*a{k}, ' * 9}]\n" for k in range(9)),
            "e+08 values of it: write it out",
        ),
    ],
)
def test_a_tasks_file_is_checked(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        compose("evaluate", [f"task={tmp_path / 'mine.yaml'}"])


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "mine_for_cli.py").write_text(
        "from paradiffpolicy.cli.environments import AUGMENTATIONS\n"
        "AUGMENTATIONS.register('mine', lambda episode: dict(episode))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(AUGMENTATIONS, "_choices", {**AUGMENTATIONS})
    cfg = compose("train", ["plugins=mine_for_cli", "augmentation=mine"])
    assert cfg.augmentation == "mine"


@pytest.mark.parametrize("content", ["1 / 0", "def (", "raise SystemExit(3)", "raise KeyError('x')"])
def test_a_module_that_cant_be_imported_is_named(tmp_path, monkeypatch, content):
    name = f"broken_{len(content)}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(InputError, match=f"plugins: {name} can't be imported"):
        compose("train", [f"plugins={name}"])
    with pytest.raises(InputError, match=f"{name}:My-v0 can't be made"):
        make_env(f"{name}:My-v0")


def test_an_expert_of_ones_own_is_registered_by_a_plugin(tmp_path, monkeypatch):
    from paradiffpolicy.cli.collect import named_expert
    from paradiffpolicy.collection.experts import EXPERTS

    module = "from paradiffpolicy.collection.experts import EXPERTS\nEXPERTS.register('own', list)\n"
    (tmp_path / "own_expert.py").write_text(module)
    (tmp_path / "mine.yaml").write_text("expert: own\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(EXPERTS, "_choices", {**EXPERTS})
    cfg = compose("collect", ["plugins=own_expert", "task=mine.yaml", "expert=scripted"])
    assert named_expert(cfg) == []


def test_fewer_steps_of_a_plan_can_be_executed(checkpoint):
    policy = load_policy(compose("evaluate", [checkpoint, "n_action_steps=4"]))
    assert policy.spec.n_action_steps == 4 and policy.spec.executed == slice(1, 5)


# ------------------------------------------------------------------------------------------- help


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out == f"paradiffpolicy {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_has_examples_that_compose_and_every_setting(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    examples = re.findall(rf"^  paradiffpolicy {command}(.*)$", out, flags=re.M)
    assert len(examples) == 3
    for example in examples:
        compose(command, [word for word in shlex.split(example) if "=" in word])
    listed = set(re.findall(r"^  ([a-z0-9_.]+)=", out, flags=re.M))
    config = compose(command, [])
    assert {entry.name for entry in dataclasses.fields(config)} <= {
        *(name.split(".")[0] for name in listed),
        *("sampler", "task"),
    }
    assert max(map(len, out[out.index("Settings:") :].splitlines())) <= 80


def test_help_into_a_pipe_that_closes_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "paradiffpolicy", "bench", "envs", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""


# ------------------------------------------------------------------------------------ the main jobs


def test_evaluate_writes_its_report(capsys, checkpoint, tmp_path):
    code, out, _ = run(capsys, "evaluate", checkpoint, *FAST, "videos=1", f"out={tmp_path / 'report'}")
    assert code == 0
    assert "rti" in out and "interval tested" in out
    names = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert names == ["ddim.mp4", "report.json", "rollout.png", "rti.mp4", "score_latency.png"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["seeds"] == [100_000, 100_001]
    assert report["samplers"]["ddim"]["iterations_per_plan"]["mean"] == 15
    deadlines = report["samplers"]["rti"]["deadlines"]
    assert deadlines["ticks"] + deadlines["missed"] in (2, 3)  # the last may have been missed


def test_processes_give_the_same_scores_and_pictures(capsys, checkpoint, tmp_path):
    scores, videos = [], []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        short = [
            "videos=1",
            "latency_plans=0",
            "paced_ticks=0",
            "samplers=ddim",
            "seeds=2",
            "task.max_steps=16",
        ]
        code, _, err = run(
            *(capsys, "evaluate", checkpoint, "reference=ddim", "capture=eager"),
            *(*short, f"workers={workers}", f"out={out}"),
        )
        assert code == 0, err
        report = json.loads((out / "report.json").read_text())
        scores.append([s["score"]["per_seed"] for s in report["samplers"].values()])
        videos.append((out / "ddim.mp4").read_bytes())
    assert scores[0] == scores[1] and videos[0] == videos[1]


def test_collected_episodes_can_be_trained_on_and_evaluated(capsys, checkpoint, tmp_path):
    store = tmp_path / "collected.zarr"
    short = ["task.max_steps=20", f"out={store}", "episodes=3", "batch=2", "sampler_name=ddim"]
    for workers in (1, 2):
        assert run(capsys, "collect", checkpoint, *short, f"workers={workers}")[0] == 0
    buffer = ReplayBuffer.open(store)
    assert buffer.episode_ends.tolist() == [20, 40, 60, 80, 100, 120]
    first = buffer.episode(0)
    assert first["keypoint"].shape == (20, 9, 2) and first["action"].shape == (20, 2)
    # Each episode has a seed of its own, the second call's go on after the first's.
    assert len({buffer.episode(k)["state"].tobytes() for k in range(6)}) == 6

    settings = [
        "policy.down_dims=[16,32]",
        "policy.diffusion_step_embed_dim=16",
        "training.n_steps=3",
        "training.batch_size=8",
        "evaluation.seeds=2",
        "evaluation.sampler=ddim",
        "sampler.paraddpm.n_steps=20",
        "sampler.speculative.n_steps=20",
        "task.max_steps=16",
    ]
    place = tmp_path / "trained"
    code, _out, err = run(
        capsys, "train", f"dataset={store}", f"run={tmp_path / 'run'}", f"checkpoint={place}", *settings
    )
    assert code == 0, err
    metadata = json.loads((place / "policy.json").read_text())["info"]
    assert metadata["dataset"]["n_episodes"] == 6 and metadata["training"]["step"] == 3
    assert metadata["training"]["scores"][0]["n_seeds"] == 2
    # paraddpm's tolerance, the one that bf16 reaches, and speculative.
    curves = [entry["windows"] for entry in metadata["iterations"].values()]
    assert len(curves) == 3 and all(set(curve) == {"5", "8", "12", "20"} for curve in curves)
    code, _, err = run(
        capsys,
        "evaluate",
        f"checkpoint={place}",
        *FAST,
        "videos=0",
        "latency_plans=0",
        f"out={tmp_path / 'r'}",
    )
    assert code == 0, err


def test_bench_latency_prints_tables_and_a_line_of_json(capsys, checkpoint, tmp_path):
    out_file, report = tmp_path / "bench.json", tmp_path / "report.json"
    described = json.loads((Path(checkpoint.removeprefix("checkpoint=")) / "policy.json").read_text())
    found = paired_difference([0.9, 0.8, 0.7], [0.9, 0.7, 0.8], 0.05).to_dict()
    samplers = {"ddpm": {}, "ddim": {f"{of}difference_to_reference": found for of in ("", "success_")}}
    content = {"reference": "ddpm", "seeds": [5, 7], "samplers": samplers}
    rewards = [f"rewards={report}"]
    refused(capsys, "report.json can't be read", "bench", "latency", checkpoint, *rewards)
    report.write_text(json.dumps(content | {"weights_sha256": "0" * 64}))
    refused(capsys, "report.json is of other weights", "bench", "latency", checkpoint, *rewards)
    sha256 = described["weights"]["sha256"]
    report.write_text(json.dumps(content | {"weights_sha256": sha256, "disturbances": {"friction": 1}}))
    refused(capsys, "report.json is of disturbed episodes", "bench", "latency", checkpoint, *rewards)
    report.write_text("[]")
    refused(capsys, "report.json is no report of samplers", "bench", "latency", checkpoint, *rewards)
    report.write_text(json.dumps(content | {"weights_sha256": sha256}))
    code, out, err = run(
        capsys,
        *("bench", "latency", checkpoint, "samplers=[ddim]", "captures=[eager,emulated]", "call_rows=[1]"),
        *rewards,
        *("networks={}", "+networks.small=[8,16]", "repeats=1", "call_repeats=2", "precisions=[f32]"),
        *("steady=3", "task.max_steps=8", f"out={out_file}"),
    )
    assert code == 0, err
    line = out.strip().splitlines()[-1]
    content = json.loads(line)
    assert content == json.loads(out_file.read_text())
    small = content["small"]
    names = [row["name"] for row in small["plans"]]
    assert names == [*BASELINES, "ddim, eager", "ddim, emulated"]
    assert [row["name"] for row in small["calls"]] == ["eager", "captured f32"]
    assert small["steady"]["ms"]["n"] == 3
    own = build_network(replace(TINY, down_dims=(8, 16)))
    assert small["parameters"] == sum(weight.numel() for weight in own.parameters())
    assert small["rates"]["f32"]["bandwidth"] > 0 and "peak memory" in out
    assert content["rewards"]["samplers"]["ddim"]["difference_to_reference"]["n"] == 3
    assert "reward against ddpm, seeds 5 to 7" in out


def test_a_number_for_all_networks_or_one_for_each():
    cfg = compose("bench latency", ["repeats=3", "steady.large=7", "+networks.tiny=[8]"])
    assert per_network(cfg, "repeats", 5) == {"shipped": 3, "large": 3, "tiny": 3}
    assert per_network(cfg, "steady", 0) == {"shipped": 0, "large": 7, "tiny": 0}


def test_a_sampler_may_have_a_capture_of_its_own(checkpoint):
    cfg = compose(
        "evaluate",
        [
            checkpoint,
            "capture=eager",
            "+sampler.captured={solver: ddim, n_steps: 4, driver: rti, capture: emulated}",
        ],
    )
    loaded = load_policy(cfg)
    captured = programs({name: sampling_policy(cfg, name, loaded).warm_up() for name in ("captured", "ddim")})
    assert [how.split(":")[0] for how in captured["captured"]["how"]] == ["emulated", "emulated"]
    assert captured["captured"]["megabytes"] > 0 == captured["ddim"]["megabytes"]


@pytest.mark.parametrize("capture", ["auto", "emulated"])
def test_a_capture_changes_no_plan_by_more_than_rounding_does(checkpoint, capture):
    plans = []
    for backend in ("eager", capture):
        cfg = compose("collect", [checkpoint, f"capture={backend}", "capture_cache=null"])
        policy = sampling_policy(cfg, "rti", load_policy(cfg))
        generator = torch.Generator().manual_seed(0)
        plans.append(policy.plan(np.full((2, 20), 256.0), generator=generator).actions)
    assert float((plans[1] - plans[0]).abs().max()) < 0.05


def test_bench_solvers_measures_every_row(capsys, checkpoint, tmp_path):
    code, out, err = run(
        capsys,
        *("bench", "solvers", checkpoint, "solvers=[sde_dpm_solver_pp_2m,heun]", "steps=[4,8]"),
        *("windows=2", "task.max_steps=16", f"out={tmp_path}"),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    found = {(row["solver"], row["n_steps"], row["driver"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 5 + 2 * 4
    assert "sde_dpm_solver_pp_2m" in out and (tmp_path / "solvers.png").stat().st_size > 10_000
    heun = found["heun", 8, "sequential"]
    assert heun["nodes"] == heun["iterations"] == 15 and heun["error"] == 0
    assert heun["flow_error"] < found["heun", 4, "sequential"]["flow_error"]
    assert found["sde_dpm_solver_pp_2m", 8, "picard"]["flow_error"] is None
    assert found["sde_dpm_solver_pp_2m", 8, "speculative"]["error"] < 1e-2  # its own noise's sequential walk


def test_bench_train_times_steps_beside_the_references(capsys, tmp_path):
    code, out, err = run(
        capsys,
        *("bench", "train", "networks={}", "+networks.small=[8,16]", "+batch_sizes.small=4"),
        *("precisions=[float32]", "turns=2", "recipe=null", f"out={tmp_path / 'train.json'}"),
    )
    assert code == 0, err
    small = json.loads((tmp_path / "train.json").read_text())["small"]
    assert (small["down_dims"], small["batch_size"]) == ([8, 16], 4)
    reference, own = small["steps"].values()
    assert own["ms"]["n"] == 2 and reference["speedup"] == [1, 1, 1] and min(own["speedup"]) > 0
    assert "paradiffpolicy, float32" in out


@pytest.mark.parametrize("name", recipes())
def test_a_recipes_settings_hold_unless_others_are_given(name):
    cfg = compose("train", [f"recipe={name}"])
    for part, settings in recipes()[name].items():
        assert {**vars(getattr(cfg, part)), **settings} == vars(getattr(cfg, part))
    cfg = compose("train", ["training.n_steps=3", f"recipe={name}"])
    usual = recipes()[name].get("training", {}).get("batch_size", compose("train", []).training.batch_size)
    assert cfg.training.n_steps == 3 and cfg.training.batch_size == usual


def test_guidance_is_an_option_for_policies_trained_for_it(tmp_path):
    tiny_checkpoint(replace(TINY, condition_dropout=0.1)).save(tmp_path / "guided")
    plans = []
    for scale in ("null", "4.0"):
        cfg = compose(
            "evaluate", [f"checkpoint={tmp_path / 'guided'}", f"guidance_scale={scale}", "capture=eager"]
        )
        policy = sampling_policy(cfg, "ddim", load_policy(cfg))
        plans.append(policy.plan(np.full((2, 20), 256.0), generator=torch.Generator().manual_seed(0)).actions)
    assert policy.guidance_scale == 4.0 and not torch.equal(*plans)


def test_info_describes_checkpoint_and_dataset(capsys, checkpoint, toy_store):
    code, out, _ = run(capsys, "info", checkpoint, f"dataset={toy_store}")
    assert code == 0
    for part in ("pusht", "torch", "data/keypoint", "96"):
        assert part in out


# --------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def evaluate_config():
    return compose("evaluate", [])


@pytest.fixture(scope="module")
def train_config():
    small = ["policy.down_dims=[16,32]", "policy.diffusion_step_embed_dim=16", "training.n_steps=1"]
    return compose("train", [*small, "augmentation=null", "evaluation.seeds=1"])


def changed(config, changes):
    """A copy of a config with other values, by dotted names."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


def set_nan(store):
    zarr.open_group(store, mode="r+")["data/action"][5, 0] = np.nan


def cut(store):
    zarr.open_group(store, mode="r+")["data/keypoint"].resize((40, 9, 2))


def wrong_ends(store):
    zarr.open_group(store, mode="r+")["meta/episode_ends"][0] = 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, "data/action has NaN or infinity at step 5"),
        (cut, "data/keypoint has 40 steps"),
        (wrong_ends, "must rise, but entry 1"),
    ],
)
def test_damaged_demonstrations_are_refused(capsys, tmp_path, toy_store, change, message):
    change(toy_store)
    refused(capsys, message, "train", f"dataset={toy_store}", f"run={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.zarr"}, "no demonstrations at nowhere.zarr"),
        ({"dataset": "demo.hdf5"}, "no demonstrations at demo.hdf5"),
        ({"dataset": None}, "dataset is null, and the task names none: write dataset=PATH"),
        ({"task.observation": []}, "observes nothing: list fields of"),
        ({"policy.horizon": 15}, "horizon=15 must be a multiple of 2"),
        ({"init": "/nowhere"}, "no checkpoint at /nowhere"),
    ],
)
def test_train_refuses(train_config, toy_store, tmp_path, changes, message):
    cfg = changed(train_config, {"dataset": str(toy_store), "run": str(tmp_path / "run"), **changes})
    with pytest.raises(InputError, match=re.escape(message)):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_an_environment_that_differs_from_the_dataset_is_refused_before_training(
    train_config, toy_store, tmp_path
):
    changes = {"dataset": str(toy_store), "run": str(tmp_path / "run")}
    with pytest.raises(InputError, match="PushT-v9 can't be made"):
        train(changed(train_config, {**changes, "task.env.id": "paradiffpolicy/PushT-v9"}))
    with pytest.raises(InputError, match=re.escape("has observations (5,) and actions (2,), but the policy")):
        train(changed(train_config, {**changes, "task.env.kwargs": {"obs_type": "state"}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("evaluate", ["samplers=paradpm"], "unknown sampler 'paradpm'; did you mean 'paraddpm'?"),
        ("evaluate", ["seedz=3"], "evaluate has no setting 'seedz'; did you mean 'seeds'?"),
        ("evaluate", ["qqq=3"], "has no setting 'qqq': paradiffpolicy evaluate --help lists them"),
        ("evaluate", ["sampler.paraddpm.windw=3"], "did you mean 'sampler.paraddpm.window'"),
        ("train", ["policy.kernel=3"], "did you mean 'policy.kernel_size'"),
        ("evaluate", ["seeds=many"], "seeds=many must be a whole number above 0"),
        ("evaluate", ["seeds=2.5"], "seeds=2.5 must be a whole number above 0"),
        ("evaluate", ["seeds=null"], "seeds=null must be a whole number above 0"),
        ("evaluate", ["seeds"], "'seeds' is not an override: write NAME=VALUE, as seeds=10"),
        ("serve", ["port=http"], "port=http must be a whole number from 0 to 65535"),
        (
            "run",
            ["scheduling.cores=a"],
            "scheduling.cores=[a] must be a list of at least one, each entry a whole number",
        ),
        ("evaluate", ["plugins=nosuch"], "plugins: nosuch can't be imported"),
        (
            "evaluate",
            ["+realtime.cases.mine={smpler: ddim}"],
            "no setting 'smpler'; did you mean 'sampler'?",
        ),
        ("evaluate", ["+realtime.cases.mine={}"], "realtime.cases.mine.sampler must be given"),
        ("evaluate", ["task=pushtt"], "unknown task 'pushtt'; did you mean 'pusht'? known: can, lift"),
        ("bench latency", ["repeats=x"], "repeats=x must be a whole number above 0"),
    ],
)
def test_settings_that_dont_exist_or_have_another_type_are_refused(command, overrides, message):
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        compose(command, overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "ddpn"}, "unknown sampler 'ddpn'; did you mean 'ddpm'?"),
        ({"seeds": 0}, "seeds=0 must be a whole number above 0"),
        ({"videos": -1}, "videos=-1 must be a whole number, 0 or above"),
        ({"margin": math.nan}, "margin=nan must be a number above 0"),
        ({"margin": math.inf}, "margin=inf must be a number above 0"),
        ({"margin": 0.0}, "margin=0 must be a number above 0"),
        ({"workers": 0}, "workers=0 must be a whole number above 0, or auto"),
        ({"workers": "all"}, "workers=all must be a whole number above 0, or auto"),
        ({"side_by_side": 0}, "side_by_side=0 must be a whole number above 0, or null"),
        ({"threads": 0}, "threads=0 must be a whole number above 0, or null"),
        ({"precision": "f8"}, "unknown precision 'f8'; known: auto, bf16, f16, f32, int8"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"realtime.clock": "wal"}, "realtime.clock: unknown clock 'wal'; did you mean 'wall'?"),
        (
            {"realtime.rates_hz": [10.0, -1.0]},
            "realtime.rates_hz=[10,-1] must be a list, each entry a number above 0",
        ),
        (
            {"realtime.cases": {"a": CaseConfig("ddpm", [3, "x"])}},
            "realtime.cases.a.latency_ms=[3,x] must be a number",
        ),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold=1.5 must be a number from"),
    ],
)
def test_values_out_of_range_are_refused(evaluate_config, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check(changed(evaluate_config, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "sampler.paraddpm: window=0 must be a whole number above 0"),
        ({"window": 2.5}, "window=2.5"),
        ({"tolerance": 0}, "tolerance=0 must be a number above 0"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"n_steps": 1000}, "n_steps=1000 must be 1 to 100"),
        ({"evaluate": "sharded"}, "torchrun"),
        ({"driver": "speculative", "solver": "ddim"}, "sampler.paraddpm"),
    ],
)
def test_samplers_that_cant_be_made_are_refused(evaluate_config, changes, message):
    settings = {**evaluate_config.sampler["paraddpm"], **changes}
    cfg = changed(evaluate_config, {"sampler": {"paraddpm": settings}})
    with pytest.raises(InputError, match=re.escape(message)):
        named_sampler(cfg, "paraddpm", TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:9"}, "device=cuda:9 can't be used here"),
        ({"task.name": "lift"}, "the checkpoint is for task 'pusht', not 'lift'"),
        ({"task.control_hz": 20.0}, "for 10 actions per second, but task 'pusht' has control_hz=20"),
        ({"checkpoint": "/nowhere"}, "no checkpoint at /nowhere"),
        ({"checkpoint": None}, "checkpoint is null, and the task names none"),
        ({"guidance_scale": 2.0}, "condition dropout"),
        ({"n_action_steps": 16}, "n_action_steps=16 must not be over horizon=16"),
    ],
)
def test_policies_that_dont_fit_are_refused(evaluate_config, checkpoint, changes, message):
    cfg = changed(evaluate_config, {"checkpoint": checkpoint.partition("=")[2], **changes})
    with pytest.raises(InputError, match=re.escape(message)):
        load_policy(cfg)


def refused(capsys, message: str, *argv: str) -> None:
    code, out, err = run(capsys, *argv)
    said = err.rstrip("\n").splitlines()[-1]  # after the progress bar, where there was one
    assert code == 2 and message in said and not out
    assert said.startswith("paradiffpolicy: ") and "Traceback" not in err


def test_evaluate_refuses_in_one_line_and_writes_nothing(capsys, checkpoint, tmp_path):
    out = f"out={tmp_path / 'out'}"
    refused(capsys, "samplers=[] must be a list of at least one", "evaluate", checkpoint, out, "samplers=[]")
    refused(
        capsys, "has observations (5,)", "evaluate", checkpoint, out, *FAST, "task.env.kwargs.obs_type=state"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["host=not.a.host.invalid"], "can't listen on not.a.host.invalid"),
        (["host=''"], "host='' isn't an address"),
        (["certificate=/nowhere.pem", "private_key=/nowhere.pem"], "no certificate at /nowhere.pem"),
        (["private_key=/nowhere.pem"], "certificate and private_key go together"),
        (["api_key=''"], "api_key must be printable ASCII text"),
    ],
)
def test_serve_refuses(capsys, checkpoint, overrides, message):
    refused(capsys, message, "serve", checkpoint, "capture=eager", "max_batch=1", "port=0", *overrides)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("bench control", "out"),
        ("bench solvers", "out"),
        ("collect", "out"),
        ("train", "run"),
        ("run", "video"),
    ],
)
def test_where_nothing_can_be_written_nothing_begins(capsys, tmp_path, command, name):
    """One line, and no progress bar before it."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.mp4"
    code, out, err = run(capsys, *command.split(), f"{name}={place}")
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"paradiffpolicy: {name}={place}") and "can't be written (Not a directory)" in err


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "with NUL"])
def test_a_name_that_no_file_can_have_is_refused(capsys, name):
    for command, setting in (("collect", "out"), ("train", "run"), ("train", "dataset"), ("info", "paths")):
        refused(capsys, f"{setting}={name[:40]!r}: no file can have", command, f"{setting}={name}")
    refused(capsys, "no file can have such a name", "info", name)
    refused(capsys, "info has no setting", "info", f"{name}=")


def test_a_folder_isnt_a_file(capsys, tmp_path):
    refused(capsys, f"out={tmp_path} is a folder: name a file", "bench", "latency", f"out={tmp_path}")


def test_a_port_in_use_is_refused(capsys, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", checkpoint, "capture=eager", "max_batch=1", f"port={port}")
    assert code == 2 and f"can't listen on 127.0.0.1:{port} (Address already in use): another port" in err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(EXTRAS, "serve", ("msgpack", "nosuchmodule"))
    for command in ("serve", "bench serve"):
        code, _, err = run(capsys, *command.split())
        assert code == 2 and "nosuchmodule isn't installed: pip install 'paradiffpolicy[serve]'" in err


def test_a_truncated_checkpoint_is_refused(capsys, checkpoint, tmp_path):
    (file,) = (tmp_path / "tiny").glob("weights-*")
    file.write_bytes(file.read_bytes()[:-1])
    for command in ("evaluate", "collect", "bench latency", "bench solvers", "serve", "bench serve"):
        refused(capsys, "truncated", *command.split(), checkpoint)


def test_processes_are_only_those_that_torchrun_starts(capsys, monkeypatch, checkpoint):
    """WORLD_SIZE and RANK are set by batch systems, too."""
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "1"), ("LOCAL_RANK", "x")):
        monkeypatch.setenv(name, value)
    assert run(capsys, "info", checkpoint.partition("=")[2])[0] == 0
    refused(capsys, "unknown task 'nix'", "info", "task=nix")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run(capsys, "info", "task=nix") == (2, "", "")  # the first process says it
    for name, value in (("WORLD_SIZE", "abc"), ("WORLD_SIZE", None), ("RANK", "abc"), ("RANK", None)):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        refused(capsys, "processes can't join", "info", checkpoint.partition("=")[2])


@pytest.mark.parametrize(
    "error", [MemoryError("9 GB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_a_lack_of_memory_is_one_line(capsys, monkeypatch, error):
    def fails(config):
        raise error

    monkeypatch.setitem(COMMANDS, "info", fails)
    refused(capsys, f"the memory isn't there ({error}): smaller sizes", "info")
    error.args = ("another reason",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="another reason"):
            main(["info"])


def test_unknown_commands_are_named(capsys):
    code, _, err = run(capsys, "bench", "solver")
    assert code == 2 and "did you mean 'bench solvers'" in err
    assert run(capsys, "bench")[0] == 2
    code, _, err = run(capsys, "evalute")
    assert code == 2 and "did you mean 'evaluate'" in err
    assert run(capsys)[0] == 2


@pytest.mark.slow
def test_a_killed_collection_keeps_its_episodes(tmp_path):
    """SIGKILL in the middle of the third episode's append."""
    tiny_checkpoint().save(tmp_path / "tiny")
    store = tmp_path / "killed.zarr"
    words = (
        f"collect checkpoint={tmp_path}/tiny out={store} task.max_steps=16 sampler_name=ddim capture=eager"
    )
    script = f"""
import os, signal
from paradiffpolicy.cli.main import main
import zarr.core.array
calls, real = 0, zarr.core.array.Array.__setitem__
def setitem(self, *args):
    global calls
    calls += 1
    if calls == 13:  # five writes per episode: three of the third's fields
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
zarr.core.array.Array.__setitem__ = setitem
main({[*words.split(), "episodes=4"]})
"""
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert ReplayBuffer.open(store).episode_ends.tolist() == [16, 32]
    assert main([*words.split(), "episodes=1"]) == 0
    assert ReplayBuffer.open(store).episode_ends.tolist() == [16, 32, 48]

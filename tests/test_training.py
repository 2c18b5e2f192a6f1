"""Training: it learns, and a run that was killed anywhere ends with the same weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paradiffpolicy import files
from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.data.dataset import WindowDataset
from paradiffpolicy.data.replay_buffer import ReplayBuffer
from paradiffpolicy.errors import InputError
from paradiffpolicy.models.networks import build_network
from paradiffpolicy.policy import Policy
from paradiffpolicy.sampling.spec import spec_sampler, spec_schedule
from paradiffpolicy.task import ObservationField
from paradiffpolicy.training.environment import check_env
from paradiffpolicy.training.settings import TrainSettings
from paradiffpolicy.training.train import Trainer

from .conftest import TINY, UNMEASURED, make_toy_store

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])  # processes that need not import everything anew
SMALL = replace(TINY, down_dims=(16,))
SETTINGS = TrainSettings(n_steps=12, batch_size=16, warmup_steps=3, log_every=4, save_every=3)


def toy_data(store: Path) -> WindowDataset:
    fields = [ObservationField("keypoint"), ObservationField("state", 0, 2)]
    return WindowDataset.of(ReplayBuffer.open(store), fields, n_obs_steps=2, horizon=16, n_action_steps=8)


def trainer(store: Path, folder: Path, **changes) -> Trainer:
    return Trainer(toy_data(store), SMALL, replace(SETTINGS, **changes), folder)


def state(folder: Path) -> dict:
    return torch.load(folder / "resume.pt", weights_only=True)


def assert_same_run(one: Path, other: Path):
    a, b = state(one), state(other)
    assert a["step"] == b["step"] and a["curve"] == b["curve"]
    for part in ("network", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)
    for key, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name]), (key, name)
    assert (one / "checkpoint/policy.json").exists()
    first, second = Checkpoint.load(one / "checkpoint"), Checkpoint.load(other / "checkpoint")
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Demonstrations, and a run on them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    store = make_toy_store(folder / "toy.zarr")
    trainer(store, folder).run(progress=False)
    return store, folder


@pytest.mark.parametrize("stops", [[1], [5], [3, 4, 11]])
def test_resumed_is_uninterrupted(uninterrupted, tmp_path, stops):
    store, whole = uninterrupted
    for stop in [*stops, 12]:
        trainer(store, tmp_path).run(until=stop, progress=False)
    assert_same_run(whole, tmp_path)


def run_until_killed(store: Path, folder: Path, at: int, after: bool) -> None:
    """A run that is killed when its ``at``-th file is about to take its place, or just has."""
    real, calls = Path.replace, itertools.count(1)

    def replace(self: Path, target: Path) -> Path:
        if next(calls) == at:
            if after:
                real(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)

    Path.replace = replace
    torch.set_num_threads(1)
    trainer(store, folder).run(progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 8])
def test_killed_within_a_save_and_resumed_is_uninterrupted(uninterrupted, tmp_path, at, after):
    """SIGKILL just before, or just after, one of the files takes its place."""
    store, whole = uninterrupted
    killed = FORKS.Process(target=run_until_killed, args=(store, tmp_path, at, after))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    trainer(store, tmp_path).run(progress=False)
    assert_same_run(whole, tmp_path)


def poisoned(run: Trainer, value: float) -> None:
    """Runs on with a weight of that value."""
    next(run.network.parameters()).data[0] = value
    run.run(progress=False)


@pytest.mark.parametrize(("value", "log_every"), [(np.nan, 20), (np.inf, 3), (1e6, 20)])
def test_a_run_that_diverged_keeps_its_last_save_and_goes_on_with_another_rate(
    uninterrupted, tmp_path, value, log_every
):
    store, _ = uninterrupted
    with pytest.raises(InputError, match="until=nan must be a whole number above 0"):
        trainer(store, tmp_path).run(until=math.nan, progress=False)
    trainer(store, tmp_path).run(until=6, progress=False)
    saved = (tmp_path / "resume.pt").read_bytes()
    with pytest.raises(
        InputError, match=r"at step (7|9): what .* last saved is kept: resume it with a train"
    ) as e:
        poisoned(trainer(store, tmp_path, log_every=log_every), value)
    assert "\n" not in str(e.value)
    assert (tmp_path / "resume.pt").read_bytes() == saved
    assert Checkpoint.load(tmp_path / "checkpoint").info["training"]["step"] == 6
    slower = trainer(store, tmp_path, learning_rate=1e-4)
    assert slower.step == 6
    checkpoint = slower.run(progress=False)
    assert checkpoint.info["training"]["learning_rates"] == [[0, 3e-4], [6, 1e-4]]
    assert all(
        weight.isfinite().all() for weight in Checkpoint.load(tmp_path / "checkpoint").weights.values()
    )
    with pytest.raises(InputError, match=r"another settings \(learning_rate=0.0001 there, 0.0003 here\)"):
        trainer(store, tmp_path)


def test_a_run_that_diverges_at_once_saves_nothing(uninterrupted, tmp_path):
    store, _ = uninterrupted
    with pytest.raises(InputError, match=r"train with a training\.learning_rate below 1000000"):
        trainer(store, tmp_path, learning_rate=1e6, warmup_steps=0).run(progress=False)
    assert not list(tmp_path.glob("*.*")) and not (tmp_path / "checkpoint").exists()


def test_a_save_of_weights_that_are_not_finite_is_refused(uninterrupted, tmp_path):
    store, _ = uninterrupted
    trainer(store, tmp_path).run(until=3, progress=False)
    saved = state(tmp_path)
    saved["ema"]["final_conv.1.bias"][0] = np.nan
    torch.save(saved, tmp_path / "resume.pt")
    with pytest.raises(InputError, match=r"resume.pt has weights that aren't finite: delete it"):
        trainer(store, tmp_path)


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """The system refuses larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", ["resume.pt", "weights-", "policy.json"])
def test_a_full_disk_ends_a_run_in_one_line(uninterrupted, tmp_path, monkeypatch, name, share):
    """In the middle of each of its writes; what was there is there, and the run goes on later."""
    store, whole = uninterrupted
    trainer(store, tmp_path).run(until=3, progress=False)
    real, sizes = files._unfinished, {path.name[:8]: path.stat().st_size for path in tmp_path.rglob("*.*")}

    @contextlib.contextmanager
    def unfinished(path: Path) -> Iterator[Path]:
        full = path.name.startswith(name)
        limit = file_size_limit(int(share * sizes[path.name[:8]])) if full else contextlib.nullcontext()
        with real(path) as temporary, limit:
            yield temporary

    monkeypatch.setattr(files, "_unfinished", unfinished)
    with pytest.raises(InputError, match=rf"{name}\S* can't be written \(File too large\): free space") as e:
        trainer(store, tmp_path).run(progress=False)
    assert "\n" not in str(e.value) and not list(tmp_path.rglob(".unfinished*"))
    assert Checkpoint.load(tmp_path / "checkpoint").info["training"]["step"] in (3, 6)
    monkeypatch.undo()
    trainer(store, tmp_path).run(progress=False)
    assert_same_run(whole, tmp_path)


def test_a_full_disk_ends_a_run_at_its_scalars(uninterrupted, tmp_path):
    store, whole = uninterrupted
    trainer(store, tmp_path).run(until=3, progress=False)
    with file_size_limit(100), pytest.raises(InputError, match=r"tfevents\S* can't be written"):
        trainer(store, tmp_path).run(progress=False)
    trainer(store, tmp_path).run(progress=False)
    assert_same_run(whole, tmp_path)


def test_the_loss_falls(toy_store, tmp_path):
    run = trainer(toy_store, tmp_path, n_steps=50, learning_rate=3e-3, warmup_steps=10, log_every=10)
    run.run(progress=False)
    assert run.curve[-1][1] < 0.5 * run.curve[0][1]


def test_scalars_are_written(toy_store, tmp_path):
    def evaluate(checkpoint: Checkpoint) -> dict[str, float]:
        return {"score": 0.25}

    settings = replace(SETTINGS, evaluate_every=6)
    run = Trainer(toy_data(toy_store), SMALL, settings, tmp_path, evaluate=evaluate)
    checkpoint = run.run(progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate", "evaluation/score"}
    assert [event.step for event in events.Scalars("evaluation/score")] == [6, 12]
    assert [score["step"] for score in checkpoint.info["training"]["scores"]] == [6, 12]
    assert Checkpoint.load(tmp_path / "checkpoint").info["training"]["scores"][-1]["score"] == 0.25


def test_a_finished_run_is_not_evaluated_twice(toy_store, tmp_path):
    calls = []

    def evaluate(checkpoint: Checkpoint) -> dict[str, float]:
        calls.append(checkpoint)
        return {"score": 1.0}

    for _ in range(2):
        Trainer(toy_data(toy_store), SMALL, SETTINGS, tmp_path, evaluate=evaluate).run(progress=False)
    assert len(calls) == 1


def test_an_evaluation_that_was_cut_off_is_done_when_the_run_goes_on(uninterrupted, tmp_path):
    store, _ = uninterrupted
    settings, steps = replace(SETTINGS, evaluate_every=6), []

    def evaluate(checkpoint: Checkpoint) -> dict[str, float]:
        steps.append(checkpoint.info["training"]["step"])
        if len(steps) == 1:
            raise KeyboardInterrupt
        return {"score": 1.0}

    with pytest.raises(KeyboardInterrupt):
        Trainer(toy_data(store), SMALL, settings, tmp_path, evaluate=evaluate).run(progress=False)
    run = Trainer(toy_data(store), SMALL, settings, tmp_path, evaluate=evaluate)
    assert run.step == 6
    run.run(progress=False)
    assert steps == [6, 6, 12] and [score["step"] for score in run.scores] == [6, 12]


def test_the_seed_decides(toy_store, tmp_path):
    ends = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        checkpoint = trainer(toy_store, tmp_path / name, seed=seed).run(until=2, progress=False)
        ends.append(checkpoint.weights["final_conv.1.weight"])
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_resuming_with_other_settings_is_refused(toy_store, tmp_path):
    trainer(toy_store, tmp_path).run(until=3, progress=False)
    with pytest.raises(InputError, match=r"another settings \(batch_size=16 there, 8 here\)"):
        trainer(toy_store, tmp_path, batch_size=8)
    with pytest.raises(InputError, match="another spec"):
        Trainer(toy_data(toy_store), replace(SMALL, kernel_size=3), SETTINGS, tmp_path)
    with pytest.raises(InputError, match="another dataset"):
        Trainer(toy_data(toy_store), SMALL, SETTINGS, tmp_path, info={"dataset": {"fingerprint": "x"}})
    trainer(toy_store, tmp_path, save_every=5)  # how often it saves doesn't decide the weights


def test_a_run_of_before_a_setting_existed_goes_on(toy_store, tmp_path):
    trainer(toy_store, tmp_path).run(until=3, progress=False)
    saved = state(tmp_path)
    del saved["identity"]["spec"]["schedule_options"]
    torch.save(saved, tmp_path / "resume.pt")
    assert trainer(toy_store, tmp_path).step == 3


def test_starting_from_a_policy_takes_its_weights_and_normalizers(toy_store, tmp_path):
    first = trainer(toy_store, tmp_path / "first").run(progress=False)
    data = toy_data(toy_store)
    other = replace(data, actions=data.actions * 2)
    second = Trainer(other, SMALL, SETTINGS, tmp_path / "second", init=first)
    assert torch.equal(second.action_normalizer.scale, first.action_normalizer.scale)
    for name, weight in second.network.state_dict().items():
        assert torch.equal(weight, first.weights[name])
    with pytest.raises(InputError, match="another spec"):
        Trainer(data, replace(SMALL, kernel_size=3), SETTINGS, tmp_path / "third", init=first)


def changed_state(change):
    def damage(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        torch.save(change(saved) or saved, path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: replaced(path, Path.mkdir),
        lambda path: replaced(path, os.mkfifo),
        lambda path: torch.save([1], path),
        *(changed_state(lambda s, k=k: s.pop(k) and None) for k in ("identity", "step", "losses", "ema")),
        *(changed_state(lambda s, v=v: s.update(step=v)) for v in (-1, 10**9, "1", math.nan)),
        *(changed_state(lambda s, v=v: s.update(seconds=v)) for v in (math.nan, None)),
        *(changed_state(lambda s, k=k: s.update({k: [3]})) for k in ("curve", "scores", "learning_rates")),
        changed_state(lambda s: s["network"].update({"final_conv.1.bias": torch.zeros(7)})),
        changed_state(lambda s: s.update(optimizer={})),
        changed_state(lambda s: s["identity"].pop("spec") and None),
    ],
)
def test_a_damaged_resume_file_is_named(uninterrupted, tmp_path, damage):
    store, folder = uninterrupted
    shutil.copy(folder / "resume.pt", tmp_path)
    damage(tmp_path / "resume.pt")
    with pytest.raises(InputError, match=r"resume\.pt (can't be read|isn't a regular file).*") as error:
        trainer(store, tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def replaced(path: Path, make) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("data", "spec", "message"),
    [
        ({}, {"horizon": 32}, "have horizon=16, the policy 32"),
        ({}, {"n_obs_steps": 3}, "have n_obs_steps=2, the policy 3"),
        ({"observations": torch.zeros(96, 19)}, {}, "have obs_dim=19, the policy 20"),
        ({"actions": torch.zeros(96, 3)}, {}, "have action_dim=3, the policy 2"),
        ({"actions": torch.zeros(95, 2)}, {}, "96 observations and 95 actions"),
        ({"steps": torch.zeros(0, 16)}, {}, "0 windows"),
    ],
)
def test_windows_that_are_not_the_policys_are_refused(uninterrupted, tmp_path, data, spec, message):
    """A longer horizon would train on shorter windows without a word."""
    windows = replace(toy_data(uninterrupted[0]), **data)
    with pytest.raises(InputError, match=message):
        Trainer(windows, replace(SMALL, **spec), SETTINGS, tmp_path)


def test_an_init_whose_weights_do_not_fit_is_refused(uninterrupted, tmp_path):
    store, folder = uninterrupted
    init = replace(Checkpoint.load(folder / "checkpoint"), weights={})
    with pytest.raises(InputError, match="weights don't fit its spec"):
        Trainer(toy_data(store), SMALL, SETTINGS, tmp_path, init=init)
    with pytest.raises(InputError, match="device=nonsense"):
        Trainer(toy_data(store), SMALL, SETTINGS, tmp_path, device="nonsense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"precision": "fp8"}, "precision"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": math.inf}, "warmup_steps=inf"),
        ({"evaluate_every": None}, "evaluate_every=None"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"weight_decay": "3"}, "weight_decay='3'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **changes)


def test_learning_rate_warms_up_and_falls_to_nothing():
    settings = TrainSettings(n_steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_condition_dropout_blanks_its_share_of_the_windows(toy_store, tmp_path):
    spec = replace(SMALL, condition_dropout=0.3)
    run = Trainer(toy_data(toy_store), spec, replace(SETTINGS, batch_size=64), tmp_path)
    seen = []
    run.form.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].clone()))
    for _ in range(10):
        run.update()
    blank = (torch.cat(seen) == 0).all(dim=1)
    assert 0.2 < float(blank.double().mean()) < 0.4
    assert run.checkpoint().spec.condition_dropout == 0.3


def test_condition_dropout_must_leave_something():
    with pytest.raises(InputError, match=r"condition_dropout=1\.0"):
        build_network(replace(SMALL, condition_dropout=1.0))


@pytest.mark.parametrize("schedule", ["vp_linear", "vp_cosine"])
def test_a_continuous_schedule_trains_and_samples(schedule, toy_store, tmp_path):
    spec = replace(SMALL, schedule=schedule, prediction="v")
    run = Trainer(toy_data(toy_store), spec, SETTINGS, tmp_path)
    t = spec_schedule(run.spec).draw(1000, torch.Generator().manual_seed(0))
    assert (t >= 0).all() and (t <= 99).all() and (t != t.round()).any()
    run.update()
    policy = Policy.from_checkpoint(run.checkpoint(), spec_sampler(spec, solver="unipc", n_steps=5))
    plan = policy.plan(torch.zeros(2, spec.obs_dim), generator=torch.Generator().manual_seed(0))
    assert plan.actions.isfinite().all()


class Scripted(gymnasium.Env):
    """Gives one observation and one reward, or raises them."""

    def __init__(self, observation, reward, action_dim):
        self.observation, self.reward = observation, reward
        self.observation_space = gymnasium.spaces.Box(-1, 1, np.shape(observation))
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_dim,))

    def reset(self, *, seed=None, options=None):
        if isinstance(self.observation, Exception):
            raise self.observation
        return self.observation, {}

    def step(self, action):
        return self.observation, self.reward, False, False, {}


@pytest.mark.parametrize(
    ("observation", "reward", "action_dim", "message"),
    [
        (np.zeros(20), 0.0, 3, r"takes actions of shape \(3,\), but task 'pusht' has action_dim=2"),
        (np.zeros(7), 0.0, 2, r"reset gives observations of shape \(7,\), but task 'pusht' has obs_dim=20"),
        ({"state": np.zeros(20)}, 0.0, 2, "gives a dict of state: flatten it"),
        (np.full(20, np.nan), 0.0, 2, "isn't 20 finite numbers"),
        (np.array(["x"] * 20), 0.0, 2, "isn't 20 finite numbers"),
        (np.zeros(20), np.nan, 2, "gives the reward nan"),
        (np.zeros(20), np.zeros(2), 2, "can't be reset and stepped: TypeError"),
        (RuntimeError("no display\nis set"), 0.0, 2, "can't be reset and stepped: RuntimeError: no display$"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(observation, reward, action_dim, message):
    with pytest.raises(InputError, match=f"^Scripted.*{message}"):
        check_env(Scripted(observation, reward, action_dim), SMALL)


def test_an_environment_that_fits_is_accepted():
    check_env(Scripted(np.zeros(20), -1.0, 2), SMALL)
    with contextlib.closing(gymnasium.make("paradiffpolicy/PushT-v0", obs_type="keypoints")) as env:
        check_env(env, SMALL)


def test_without_evaluation_training_needs_no_environment(capsys, toy_store, tmp_path):
    settings = [f"dataset={toy_store}", "task.env.id=Nowhere-v0", f"run={tmp_path / 'run'}"]
    assert main(["train", *settings]) == 2  # before any step
    assert "Nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()
    small = ["policy.down_dims=[16]", "policy.diffusion_step_embed_dim=16", "training.batch_size=8"]
    small += UNMEASURED
    assert main(["train", *settings, *small, "training.n_steps=2", "evaluation.seeds=0"]) == 0
    trained = Checkpoint.load(tmp_path / "run" / "checkpoint")
    assert trained.info["training"]["step"] == 2
    # Its observation contract is the task's, with the shapes of the dataset.
    fields = trained.spec.contract.observation
    assert [(field.key, field.shape) for field in fields] == [("keypoint", (9, 2)), ("state", (5,))]
    assert main(["train", *settings, *small, "training.n_steps=2", "evaluation.seeds=0"]) == 0  # resumed

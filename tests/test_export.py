"""Exported plans equal the policy's, on OpenVINO and ONNX Runtime, from Python and from C++."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import main
from paradiffpolicy.clock import VirtualClock
from paradiffpolicy.control.controller import Controller
from paradiffpolicy.control.fallback import hold_last, stop
from paradiffpolicy.data.normalizer import Normalizer
from paradiffpolicy.errors import InputError
from paradiffpolicy.export.folder import export_policy
from paradiffpolicy.export.onnx_model import onnx_model
from paradiffpolicy.export.plan import Affine, plan_program
from paradiffpolicy.planning.blending import Latest, TemporalEnsemble
from paradiffpolicy.planning.delayed import DelayedPlanner
from paradiffpolicy.planning.request import PlanReply
from paradiffpolicy.policy import Policy
from paradiffpolicy.presets import presets
from paradiffpolicy.sampling.capture.openvino import core
from paradiffpolicy.sampling.capture.program import Program
from paradiffpolicy.sampling.noise import generators_for
from paradiffpolicy.sampling.spec import spec_sampler
from paradiffpolicy.types import PolicySpec

from .conftest import ROOT, SHIPPED, TINY, tiny_checkpoint
from .pages import save_files

CPP = ROOT / "examples" / "cpp"
OPENVINO = Path(ov.__path__[0])
SHARE = 1e-5
"""Of the actions' range, by which float32 in another order may differ; 2.4e-6 was measured."""
EXECUTED = (8, 3, 0, 16)
"""Steps between plans."""


def sampled(checkpoint: Checkpoint, **settings) -> Policy:
    return Policy.from_checkpoint(checkpoint, spec_sampler(checkpoint.spec, **settings))


def preset_settings(name: str) -> dict:
    """A preset's, with a window where that is to be measured, and fewer steps where there are a hundred."""
    settings = {key: value for key, value in presets()[name].items() if key != "checkpoint"}
    settings |= {"window": 10} if settings.get("window") == "auto" else {}
    return settings | ({"n_steps": 12} if settings["n_steps"] == 100 else {})


def windows_of(policy: Policy, batch: int):
    """An observation window per plan, about the middle of the training data."""
    draw, middle = np.random.default_rng(0), policy.middle_window(batch).numbers.numpy()
    width = 1 / np.abs(policy.observation_normalizer.scale.numpy())
    return [(middle + 0.2 * width * draw.standard_normal(middle.shape)).astype(np.float32) for _ in EXECUTED]


def plans_of(policy: Policy, batch: int = 1):
    """Per plan: the steps executed before it, its window, its noise, and its actions."""
    spec, previous = policy.spec, None
    for k, (executed, window) in enumerate(zip(EXECUTED, windows_of(policy, batch), strict=True)):
        shape, solution = (spec.horizon, spec.action_dim), None if previous is None else previous.solution
        seeds = generators_for(k, batch)
        noise, _ = policy.sampler.start(policy.sampler.tableau, shape, solution, executed, seeds)
        previous = policy.plan(window, previous, generator=k, executed_steps=executed)
        given = {"x_T": noise.x_T.numpy(), "z": noise.z.numpy(), "u": noise.u.numpy()}
        yield executed, window, given, previous.actions.numpy()


def deviation(policy: Policy, actions, expected) -> float:
    """The largest, as a share of the actions' range."""
    return float((np.abs(actions - expected) * np.abs(policy.action_normalizer.scale.numpy()) / 2).max())


@functools.cache
def python_example():
    spec = importlib.util.spec_from_file_location("plan_example", ROOT / "examples" / "python" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OpenVINOPlans:
    """The same as the example's Policy, on OpenVINO."""

    def __init__(self, folder: Path) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        self.models = {
            path.stem: core().compile_model(path, "CPU", options) for path in sorted(folder.glob("*.xml"))
        }
        self.state: dict = {}

    def plan(self, window, executed, **noise):
        model = self.models["plan_warm" if self.state and "plan_warm" in self.models else "plan"]
        feed = {"observation": window, "executed": np.array([executed]), **noise, **self.state}
        names = [port.any_name for port in model.inputs]
        outputs = {port.any_name: v.copy() for port, v in model({name: feed[name] for name in names}).items()}
        self.state = {k.replace("next_", "last_"): v for k, v in outputs.items() if k.startswith("next_")}
        return outputs["actions"]


def check_equal(policy: Policy, folder: Path, batch: int = 1) -> None:
    runtimes = python_example().Policy(folder), OpenVINOPlans(folder)
    for executed, window, noise, expected in plans_of(policy, batch):
        for runtime in runtimes:
            used = {name: noise[name] for name in used_noise(folder, runtime)}
            actions = runtime.plan(window, executed, **used)
            assert deviation(policy, actions, expected) < SHARE, type(runtime).__name__


def used_noise(folder: Path, runtime) -> list[str]:
    inputs = json.loads((folder / "plan.json").read_text())["models"]["plan"]["inputs"]
    return [port["name"] for port in inputs if port["name"] in ("x_T", "z", "u")]


@pytest.mark.parametrize(
    "name", ["rti", "student_warm", "ddpm", "paraddim", "speculative_sde", "paraddpm_published"]
)
def test_every_driver_exports_and_plans_equally(name, tmp_path):
    policy = sampled(tiny_checkpoint(), **preset_settings(name))
    metadata = export_policy(policy, tmp_path / "out")
    usual = policy.sampler.start.__name__
    assert set(metadata["models"]) == {"plan"} | ({"plan_warm"} if usual != "cold_start" else set())
    check_equal(policy, tmp_path / "out")


def test_operations_equal_pytorchs(tmp_path):
    """Also those that no preset has, for networks and solvers of one's own."""

    def outputs(x):
        flat, positive = x.flatten(1), x > 0
        return {
            "functions": x.exp() + x.square().sqrt() + x.sigmoid() + x.tanh() + x.sin() + x.cos() + x.abs(),
            "bounds": torch.minimum(x, x * 2) + torch.maximum(x, -x) + x.clamp(max=0.5),
            "logic": (positive & (x < 1)) | (positive.logical_not() & (x >= -1)),
            "any": positive.any(-1),
            "all": positive.all(1, keepdim=True),
            "amin": x.amin(1) + x.amax(1),
            "norm": torch.linalg.vector_norm(x, dim=(1, 2)),
            "cumsum": positive.cumsum(0),
            "pad": torch.nn.functional.pad(x, (1, 2, 0, 1), value=0.5),
            "parts": torch.cat((*x.chunk(2, -1), torch.ones_like(x)), -1),
            "gelu": torch.nn.functional.gelu(4 * x),
            "softmax": (4 * x).softmax(dim=1) + (4 * x).softmax(dim=-1),
            "stack": torch.stack(x.unbind(1), -1),
            "product": flat @ flat.t(),
            "where": torch.where(positive, x, 0.0).to(torch.int64),
            "steps": x[:, 1:, ::2] * x[:, :1, :1].expand(-1, 2, 2),
        }

    program = Program(
        init=lambda inputs: {"x": inputs["x"]},
        iterate=lambda state: {"x": state["x"] * 0.5},
        done=lambda state: torch.tensor(False),
        finish=lambda inputs, state: outputs(state["x"]),
        count=2,
        limit=2,
        inputs={"x": torch.zeros(2, 3, 4)},
    )
    onnx.save(onnx_model(program, "operations"), tmp_path / "operations.onnx")
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(tmp_path / "operations.onnx")
    for (name, expected), value in zip(
        outputs(x / 4).items(), session.run(None, {"x": x.numpy()}), strict=True
    ):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("task", "name"), [("pusht_keypoints", "rti"), ("lift", "renoised")])
def test_shipped_policies_plan_equally(name, task, tmp_path):
    policy = sampled(Checkpoint.load(ROOT / "checkpoints" / task), **preset_settings(name))
    export_policy(policy, tmp_path / "out")
    check_equal(policy, tmp_path / "out")


@pytest.mark.parametrize("n_cond_layers", [0, 1])
def test_a_transformer_plans_equally(n_cond_layers, tmp_path):
    options = {"n_layer": 2, "n_head": 2, "n_emb": 16, "n_cond_layers": n_cond_layers}
    spec = replace(TINY, network="transformer", network_options=options)
    policy = sampled(tiny_checkpoint(spec), **preset_settings("rti"))
    export_policy(policy, tmp_path / "out", batch=2)
    check_equal(policy, tmp_path / "out", batch=2)


def test_batches_and_guidance(tmp_path):
    spec = replace(TINY, condition_dropout=0.1)
    policy = sampled(tiny_checkpoint(spec), **preset_settings("rti")).with_guidance(2.0)
    export_policy(policy, tmp_path / "out", batch=3)
    check_equal(policy, tmp_path / "out", batch=3)


def test_programs_of_torch_export_plan_equally(tmp_path):
    policy = sampled(tiny_checkpoint(), **preset_settings("student_warm"))
    export_policy(policy, tmp_path / "out", torch_too=True)
    plans = [torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("plan", "plan_warm")]
    state: dict = {}
    for executed, window, noise, expected in plans_of(policy):
        given = {"observation": torch.from_numpy(window), "x_T": torch.from_numpy(noise["x_T"]), **state}
        given |= {"executed": torch.tensor([executed])} if state else {}
        outputs = plans[bool(state)](given)
        state = {k.replace("next_", "last_"): v for k, v in outputs.items() if k.startswith("next_")}
        assert deviation(policy, outputs["actions"].numpy(), expected) < SHARE


def test_a_number_of_iterations_that_depends_on_data_is_not_unrolled():
    policy = sampled(tiny_checkpoint(), **preset_settings("paraddim"))
    with pytest.raises(InputError, match="their number is known only as it plans: leave torch_too=false"):
        export_policy(policy, "nowhere", torch_too=True)


def test_the_weights_are_in_a_file_once(tmp_path):
    """Whatever the number of iterations."""
    policy = sampled(Checkpoint.load(SHIPPED), **preset_settings("rti"))
    export_policy(policy, tmp_path / "out")
    size = sum(weight.numel() * 4 for weight in policy.network.parameters())
    for path in tmp_path.glob("out/*.bin"):
        assert path.stat().st_size < 1.1 * size
    for path in tmp_path.glob("out/*.onnx"):
        assert path.stat().st_size < 1.1 * size
        onnx.checker.check_model(onnx.load(path), full_check=True)


def test_metadata_says_what_the_numbers_mean(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "sampler_name=student", f"out={out}", "n_action_steps=4"]) == 0
    assert "observation [1, 2, 20], x_T [1, 16, 2] -> actions [1, 16, 2]" in capsys.readouterr().out
    about = json.loads((out / "plan.json").read_text())
    student = Policy.load(SHIPPED / "student")
    assert about["network_sha256"] == student.model.digest
    assert about["sampler_settings"] == presets()["student"]
    wanted = {"task": "pusht", "n_obs_steps": 2, "n_action_steps": 4, "horizon": 16, "control_hz": 10.0}
    assert wanted.items() <= about.items()
    assert about["contract"]["action_unit"] == "px" and about["repeating_holds_still"]
    model = core().read_model(out / "plan.xml")
    assert model.get_rt_info(["paradiffpolicy", "n_action_steps"]).astype(str) == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=null"], "out=null must be a path"),
        (["out=here"], "here exists: choose another path"),
        (["out=new", "sampler_name=speculative"], "sampler.speculative: window=auto is measured"),
        (["out=new", "sampler_name=rty"], "unknown sampler 'rty'; did you mean 'rti'"),
        (["out=new", "batch=0"], "batch=0 must be"),
        (
            ["out=new", "sampler_name=ddpm", "torch_too=true"],
            "their number is 100, over 16: leave torch_too=false",
        ),
        (["out=new", "checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["out=new", "sampler.paraddpm.evaluate=sharded", "sampler_name=paraddpm"], "sampler.paraddpm: "),
        (["out=new", "guidance_scale=2"], "guidance needs a policy that was trained with condition dropout"),
    ],
)
def test_bad_settings_are_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.split("\n") if line and not line.startswith("\rexporting")]
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_sampler_that_no_runtime_can_repeat_is_refused():
    policy = sampled(tiny_checkpoint(), solver="ddim", n_steps=4)
    own = replace(policy.sampler, driver=lambda denoise, tableau, noise, guess=None: None)
    with pytest.raises(InputError, match="isn't an IterativeDriver"):
        export_policy(policy.with_sampler(own), "nowhere")
    own = replace(policy.sampler, start=lambda *arguments: policy.sampler.start(*arguments))
    with pytest.raises(InputError, match="a start of one's own"):
        export_policy(policy.with_sampler(own), "nowhere")


def test_a_policy_that_plans_in_halves_keeps_its_tolerance():
    """Which it raises for itself alone: the exported models compute in float32."""
    policy = sampled(tiny_checkpoint(), **preset_settings("paraddim"))
    halves = replace(policy, capture=replace(policy.capture, precision="bf16"))
    assert halves.driver != policy.driver
    models = [onnx_model(plan_program(each, warm=False), "plan") for each in (policy, halves)]
    assert models[0] == models[1]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_policy(sampled(tiny_checkpoint(), solver="ddim", n_steps=2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_far_from_zero_lose_little_and_constant_ones_come_back():
    data = torch.tensor([[1e4, 5.0, -1.0], [1e4 + 7, 5.0 + 2e-5, 1.0]]).double()
    normalizer, raw = Normalizer.fit(data), torch.tensor([[1e4 + 3, 5.0, 0.5]])
    affine, rounding = Affine(normalizer, "number"), torch.from_numpy(np.spacing(raw.numpy()))
    error = (affine.normalize(raw) - normalizer.normalize(raw)).abs()
    assert (error <= 2 * rounding * normalizer.scale).all()
    plan = torch.tensor([[0.5, 0.9, 0.3], [-1.0, -0.9, 1.0]])
    error = (affine.unnormalize(plan) - normalizer.unnormalize(plan)).abs()
    assert (error <= 2 * rounding).all()


def test_values_that_float32_cannot_tell_apart_are_refused():
    far = Normalizer.fit(torch.tensor([[0.0, 1e9], [1.0, 1e9 + 7]], dtype=torch.float64))
    with pytest.raises(InputError, match="number 1 varies little next to how far it is from zero"):
        Affine(far, "number")


# ------------------------------------------------------------------------------------------- examples


def test_the_python_example_needs_no_torch(tmp_path):
    export_policy(sampled(tiny_checkpoint(), **preset_settings("rti")), tmp_path / "out")
    example = str(ROOT / "examples" / "python" / "plan.py")
    code = f"import runpy, sys; sys.argv = ['', 'out']; runpy.run_path({example!r}, run_name='__main__')"
    code += "; assert not {'torch', 'paradiffpolicy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * TINY.n_action_steps


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compiles a program, once: an example's name, or a path without .cpp."""
    compiler = shutil.which("g++")
    library = next(iter(sorted((OPENVINO / "libs").glob("libopenvino.so*"))), None)
    if compiler is None or library is None or not (OPENVINO / "include" / "openvino").is_dir():
        pytest.skip("g++, or OpenVINO's headers, aren't here")
    folder = tmp_path_factory.mktemp("examples")

    @functools.cache
    def built(name: str) -> Path:
        options = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CPP}", "-pthread"]
        if name != "chunks":
            options += ["-isystem", str(OPENVINO / "include"), str(library), f"-Wl,-rpath,{library.parent}"]
        program = folder / Path(name).name
        command = [compiler, str(CPP / f"{name}.cpp"), *options, "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return built


def run_program(program: Path, *words: str, text: str = "") -> list[list[float]]:
    done = subprocess.run([program, *words], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [[float(number) for number in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rti", "ddim"])
def test_cpp_plans_equally(name, build, tmp_path):
    policy = sampled(tiny_checkpoint(), **preset_settings(name))
    export_policy(policy, tmp_path / "out")
    plans, text = list(plans_of(policy)), ""
    for executed, window, noise, _ in plans:
        numbers = [*window.ravel().tolist(), *noise["x_T"].ravel().tolist()]
        text += " ".join(map(repr, [executed, *numbers])) + "\n"
    printed = run_program(build("plan"), str(tmp_path / "out"), text=text)
    for (_, _, _, expected), actions in zip(plans, printed, strict=True):
        assert deviation(policy, np.reshape(actions, expected.shape), expected) < SHARE


@pytest.mark.slow
def test_cpp_refuses_what_it_cannot_plan_for(build, tmp_path):
    export_policy(sampled(tiny_checkpoint(), **preset_settings("ddim")), tmp_path / "out")
    text = " ".join(["8", *["nan"] * 40, *["0"] * 32])
    for folder, given, message in (
        ("nowhere", text, "nowhere"),
        ("out", text, "the observation window has NaN or infinity"),
        ("out", "8 1 2 3", "a number is missing"),
    ):
        command = [build("plan"), tmp_path / folder]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_the_page_for_cpp_runs(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_files("docs/export.md", tmp_path)
    export_policy(sampled(tiny_checkpoint(), **preset_settings("rti")), "exported")
    (action,) = run_program(build(str(tmp_path / "first")))
    assert len(action) == TINY.action_dim


@pytest.mark.slow
def test_the_cpp_loop_acts_after_the_first_plan(build, tmp_path):
    spec = replace(TINY, control_hz=100.0)
    export_policy(sampled(tiny_checkpoint(spec), **preset_settings("rti")), tmp_path / "out")
    done = subprocess.run([build("loop"), tmp_path / "out"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    acted = [len(line.split()) == TINY.action_dim for line in lines if line != "stop"]
    assert all(acted) and len(acted) > 15


# -------------------------------------------------------------------------------------------- chunks


class LoggedPlanner(DelayedPlanner):
    """Random plans after random latencies, written down as the C++ program reads them."""

    def __init__(self, clock, draw, lines, rate_hz, longest) -> None:
        super().__init__(self.begin, clock, lambda: draw.uniform(0, longest))
        self.draw, self.lines, self.rate_hz = draw, lines, rate_hz
        self.clock = clock

    def begin(self, request):
        actions = self.draw.normal(size=(CHUNKS.horizon, CHUNKS.action_dim))
        return lambda: PlanReply(request.tick, request.session, request.asked, 0.0, 1, 0.0, actions)

    def poll(self):
        reply = super().poll()
        if reply is not None:
            now = round(self.clock.now() * self.rate_hz)
            numbers = " ".join(map(repr, reply.actions.ravel().tolist()))
            self.lines.append(f"plan {reply.tick} {now} {numbers}")
        return reply


CHUNKS = PolicySpec("any", obs_dim=1, action_dim=2, n_obs_steps=3, horizon=12, n_action_steps=4)
BLENDINGS = {"latest": Latest, "temporal_ensemble 0.1": functools.partial(TemporalEnsemble, decay=0.1)}


class Unplanned:
    """What a controller asks of a policy whose plans come from elsewhere."""

    spec = CHUNKS


@pytest.mark.parametrize("fallback", ["hold 7.5", "stop"])
@pytest.mark.parametrize("blending", BLENDINGS)
@pytest.mark.parametrize("stride", [1, 3])
def test_cpp_chunk_logic_is_the_controllers(stride, blending, fallback, build):
    """Ticks are missed, plans come late, overlap, or come after the old one has ended."""
    for seed in range(12):
        draw, clock, rate = np.random.default_rng(seed), VirtualClock(), CHUNKS.control_hz * stride
        lines = [
            f"grid {CHUNKS.n_obs_steps} {CHUNKS.horizon} {CHUNKS.action_dim} {stride}",
            blending,
            fallback,
        ]
        longest = draw.choice([0.1, 0.5, 2.5])

        def planner(policy, generator, clock, draw=draw, lines=lines, rate=rate, longest=longest):
            return LoggedPlanner(clock, draw, lines, rate, longest)

        controller = Controller(
            Unplanned(),
            rate,
            planner=planner,
            clock=clock,
            blending=BLENDINGS[blending],
            replan_every=int(draw.integers(0, 6)),
            fallback=hold_last if fallback.startswith("hold") else stop,
            fallback_timeout=7.5 / rate,
            max_observation_age=1e6,
        )
        expected, tick = [], 0
        with controller:
            controller.reset(origin=0.0)
            for _ in range(80):
                clock.sleep_until(tick / rate)
                action = controller.tick(np.zeros(1), tick)
                lines.append(f"tick {tick}")
                expected.append([controller.latest.plan_index, *([] if action is None else action)])
                tick += int(draw.choice([1, 1, 1, 2, 5]))
        printed = run_program(build("chunks"), text="\n".join(lines))
        assert [len(line) for line in printed] == [len(line) for line in expected]
        for line, wanted in zip(printed, expected, strict=True):
            np.testing.assert_allclose(line, wanted, rtol=0, atol=1e-12)
        steps = {line[0] for line in expected}
        assert len(steps) > 2

"""README and docs are true: code runs, command lines compose, tables are fresh, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from paradiffpolicy.checkpoint import Checkpoint
from paradiffpolicy.cli.main import COMMANDS, dispatch
from paradiffpolicy.registry import Registry
from paradiffpolicy.tables import publish
from paradiffpolicy.task import Camera, Contract, ObservationField

from .conftest import ROOT, SHIPPED, TINY, load_script, tiny_checkpoint
from .foreign import ckpt, lerobot
from .foreign_images import PUSHT, Hybrid
from .hub_server import cached
from .pages import PAGES, blocks, read, save_files, steps

PIXELS = replace(
    TINY,
    obs_dim=2,
    contract=Contract(
        (ObservationField("state", 0, 2, shape=(5,)),), "position", cameras=(Camera("img", (96, 96, 3)),)
    ),
    encoder_options={"width": 8, "keypoints": 4},
    image_features=8,
)
"""A policy of the task pusht_pixels."""
REPORT = json.loads((SHIPPED / "report" / "report.json").read_text())
ROBOMIMIC = {"lift": 0.98, "can": 0.9, "square": 0.7}
"""Success that sequential DDPM must have."""

OTHER_PROGRAMS = {"cmake", "git", "mkdir", "pip", "python", "ray", "rerun", "sed", "tar"}
"""Programs that command lines use beside ours."""

PRELUDE = """
paradiffpolicy() { printf '%s\\0' "$@" >&3; printf '\\1' >&3; }
.venv/bin/paradiffpolicy() { paradiffpolicy "$@"; }
accelerate() { torchrun "$@"; }
torchrun() { while [ "$1" != -m ]; do shift; done; shift 2; paradiffpolicy "$@"; }
command_not_found_handle() { printf '%s\\0%s\\0\\1' "not found" "$1" >&3; }
PATH=/nowhere
"""
"""Commands are written to a pipe in place of being run; nothing else is found."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with nothing but the shipped checkpoints, from which modules are imported."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if (tmp_path / f"{name}.py").exists()]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """The shipped policy's like, with a network that compiles and computes in no time."""
    shipped = Checkpoint.load(SHIPPED)
    spec = replace(shipped.spec, down_dims=TINY.down_dims, diffusion_step_embed_dim=16)
    folder = tmp_path_factory.mktemp("narrow")
    replace(shipped, spec=spec, weights=tiny_checkpoint(spec).weights).save(folder)
    return folder


@pytest.fixture
def _own_registrations(monkeypatch):
    """What a page registers is gone after it."""
    registered, register = [], Registry.register

    def spy(self, name, choice):
        registered.append((self, name))
        return register(self, name, choice)

    monkeypatch.setattr(Registry, "register", spy)
    yield
    for registry, name in registered:
        registry._choices.pop(name, None)


# ------------------------------------------------------------------------------------------------ code


@pytest.mark.slow
@pytest.mark.usefixtures("_own_registrations")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_code_runs(page, here, narrow, monkeypatch):
    """In the page's order, names shared; quickstart's steps run the shipped network."""
    (here / "checkpoints").unlink()
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / SHIPPED.name).symlink_to(narrow)
    save_files(page, here)
    if page == "docs/images.md":
        tiny_checkpoint(PIXELS).save(here / "outputs/train/pixels/checkpoint")
    if page == "docs/foreign.md":
        lerobot(here / "pretrained_model")
        ckpt(here / "epoch=0550-test_mean_score=0.969.ckpt")
        Hybrid(meta=PUSHT).save(here / "latest.ckpt")
        constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub isn't installed")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
        cached(here / "cache", "lerobot/reach", here / "pretrained_model")
    names: dict[str, object] = {"__name__": page}
    for match in blocks(page, "python"):
        if not match["name"] and not match["step"]:
            line = read(page)[: match.start("body")].count("\n")
            exec(compile("\n" * line + match["body"], str(ROOT / page), "exec"), names)
    if page == "docs/embed.md":  # controllers that have waited for a plan give actions
        assert names["action"].shape == names["safe_action"].shape == (2,)


def lines_of(page: str, folder: Path) -> list[list[str]]:
    """The words of every command of ours in the page's shell blocks, as a shell splits them."""
    script = PRELUDE + "\n".join(match["body"] for match in blocks(page, "sh"))
    words = folder / "words"
    subprocess.run(
        ["/bin/bash", "-c", f"exec 3>{words}\n{script}"], cwd=folder, capture_output=True, env={}, check=False
    )
    return [line.split("\0")[:-1] for line in words.read_text().split("\1") if line]


@pytest.mark.usefixtures("_own_registrations")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_command_lines_are_valid(page, here, monkeypatch):
    """Every command exists and its settings compose; other programs are known; scripts exist."""
    save_files(page, here)
    composed = []
    for name in COMMANDS:
        monkeypatch.setitem(COMMANDS, name, composed.append)
    lines = lines_of(page, here)
    for words in lines:
        if words[0] == "not found":
            assert words[1] in OTHER_PROGRAMS, words[1]
        else:
            assert dispatch(words) == 0
    text = "".join(match["body"] for match in blocks(page, "sh"))
    for script in re.findall(r"^(?:\.venv/bin/python )?(scripts/\S+)", text, flags=re.M):
        assert (ROOT / script).exists(), script
    assert len(composed) >= len(re.findall(r"^paradiffpolicy [^-]", text, flags=re.M))


SHORTER = """
paradiffpolicy() {
    case $1 in
        train)
            set -- "$@" training.n_steps=5 task.max_steps=8 'policy.down_dims=[16,32]' \
                sampler.paraddpm.window=10 sampler.speculative.window=10
            [[ "$*" = *evaluation.seeds=0* ]] || set -- "$@" evaluation.seeds=1 ;;
        evaluate)  # DDPM-100 with the shipped network takes a second per plan
            set -- "$@" seeds=1 task.max_steps=8 latency_plans=1 paced_ticks=1 videos=1
            for sampler in ddpm paraddpm speculative; do set -- "$@" sampler.$sampler.n_steps=10; done
            set -- "$@" sampler.paraddpm.window=10 sampler.speculative.window=10
            [[ "$*" = *" task="* ]] || set -- "$@" latency_plans=0 paced_ticks=0 ;;
        run) set -- "$@" seconds=1 ;;
    esac
    case $1 in
        train | evaluate | run) set -- "$@" capture=eager ;;
    esac
    ask paradiffpolicy "$@"
}
"""
"""Settings that make the steps quicker; the later of two holds."""

MADE = {
    "docs/quickstart.md": ["first/report.json", "first/rollout.png", "drive/record.npz"],
    "docs/train.md": [
        *("outputs/train/reach/checkpoint/policy.json", "report/report.json", "drive/report.json"),
        "outputs/train/offline/checkpoint/policy.json",
    ],
}
"""What the steps of a page leave in the folder."""


@pytest.mark.slow
def test_steps_work_as_printed(tmp_path):
    """In empty folders outside the repository, with the package as a wheel of the last commit installs it:
    nothing comes from the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), site, "zip")
    assert (site / "paradiffpolicy/study/page/page.html").exists()  # what isn't Python is shipped, too
    script = [SHORTER]
    for page in MADE:
        here = tmp_path / Path(page).stem
        here.mkdir()
        save_files(page, here)
        script += [f"cd {here}", steps(page)]
    walk = [sys.executable, "-P", str(Path(__file__).with_name("walk.py"))]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        walk, input="\n".join(script), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(site))
    for page, made in MADE.items():
        for path in made:
            assert (tmp_path / Path(page).stem / path).exists(), path


# ---------------------------------------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script("tables")


def test_tables_are_the_reports(tables):
    assert not tables.stale(), "run scripts/tables"


def test_every_table_stands_somewhere(tables):
    shown = {match["name"] for page in PAGES for match in tables.BLOCK.finditer(read(page))}
    assert shown == set(tables.TABLES)


def test_a_changed_figure_or_report_is_stale(tables):
    text = read("docs/samplers.md")
    assert tables.renewed(text) == text
    assert tables.renewed(text.replace("0.993 ±", "0.994 ±", 1)) == text
    report = re.search(r"report \S+ (\w+)", text)[1]
    assert tables.renewed(text.replace(report, "0" * 12)) == text


def test_reports_of_other_weights_are_refused(tables):
    text = read("docs/samplers.md")
    weights = re.search(r"weights \S+ (\w+)", text)[1]
    with pytest.raises(ValueError, match="evaluate them again"):
        tables.renewed(text.replace(weights, "0" * 12))


def test_a_report_that_holds_another_hash_of_the_weights_is_refused(tables, tmp_path, monkeypatch):
    """Also where its table is new: the report itself says what it was made of."""
    folder, report = tmp_path / "policy", tmp_path / "report.json"
    folder.mkdir()
    (folder / "policy.json").write_text('{"weights": {"file": "w"}, "info": {"dataset": {"episodes": 2}}}')
    (folder / "w").write_bytes(b"weights")
    publish([], {"figure": 1, "checkpoint": "policy"}, report, checkpoint=folder)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(tables.TABLES, "one", (("report.json",), lambda report: [report]))
    assert re.search(r" · weights policy \w{12}$", tables.hashes("one"))
    (folder / "w").write_bytes(b"others")
    tables.sha256.cache_clear()
    with pytest.raises(ValueError, match="is of other weights than policy has now: make it"):
        tables.hashes("one")


REPORTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("docs/reports/*.json", "checkpoints/*/*/*.json")
    for path in ROOT.glob(pattern)
    if path.name != "policy.json"
)

WITHOUT_HASHES = {
    *(f"docs/reports/stopping_{name}.json" for name in ("ddpm", "ode")),
    *(f"checkpoints/pusht_keypoints/{name}/report.json" for name in ("captured", "precision", "realtime")),
    *(f"checkpoints/{task}/realtime/report.json" for task in ROBOMIMIC),
    *(f"checkpoints/{task}/report/report.json" for task in (*ROBOMIMIC, "pusht_keypoints")),
    "checkpoints/pusht_keypoints/realtime/wall.json",
}
"""Reports of before they held hashes, which no command makes any more."""


@pytest.mark.parametrize("path", REPORTS, ids=str)
def test_reports_say_how_they_were_made_or_that_they_are_transcribed(path):
    report = json.loads((ROOT / path).read_text())
    if report.get("transcribed"):
        assert report["command"] and report["date"]
    elif str(path) not in WITHOUT_HASHES or "code_sha256" in report:
        assert {"command", "date", "code_sha256", "machine", "versions"} <= set(report)
        if "checkpoint" in report:
            weights = json.loads((ROOT / report["checkpoint"] / "policy.json").read_text())["weights"]
            assert report["weights_sha256"] == weights["sha256"] and "data" in report


# ----------------------------------------------------------------------------------------------- links


def slugs(text: str) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            assert anchor in slugs(linked.read_text()), target


def test_every_page_is_linked_from_the_readme():
    for page in PAGES[1:]:
        assert f"]({page})" in read("README.md"), page


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


# ------------------------------------------------------------------------------------ shipped policies


@pytest.mark.parametrize(("task", "wanted"), ROBOMIMIC.items())
def test_the_shipped_policies_of_robomimics_tasks_keep_their_promise(task, wanted):
    """At most 12 MB; success of sequential DDPM over at least 50 fresh seeds."""
    folder = ROOT / "checkpoints" / task
    assert sum(f.stat().st_size for f in folder.glob("weights-*")) <= 12e6
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["seeds"][1] - report["seeds"][0] + 1 >= 50
    assert report["samplers"]["ddpm"]["score"]["mean"] >= wanted


def test_the_shipped_policy_keeps_its_promise():
    """At most 12 MB; sequential DDPM at least 0.92 over 50 seeds; ParaDDPM and speculation equivalent
    within 0.05; iterations per plan; by the report that lies beside the weights."""
    assert sum(f.stat().st_size for f in SHIPPED.glob("weights-*")) <= 12e6
    samplers = REPORT["samplers"]
    assert REPORT["seeds"][1] - REPORT["seeds"][0] + 1 >= 50
    assert samplers["ddpm"]["score"]["mean"] >= 0.92
    fresh = json.loads((SHIPPED / "fresh" / "report.json").read_text())["samplers"]
    assert fresh["ddpm"]["score"]["mean"] >= 0.92
    for name in ("paraddpm", "speculative"):
        assert samplers[name]["difference_to_reference"]["verdict"] == "equivalent within 0.05"
        assert fresh[name]["difference_to_reference"]["verdict"] == "equivalent within 0.05"
    for name, iterations in {
        "paraddpm": 10,
        "speculative": 10,
        "paraddim": 5,
        "paradpm_solver_pp": 5,
    }.items():
        assert samplers[name]["iterations_per_plan"]["mean"] <= iterations

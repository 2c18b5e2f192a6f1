"""A study stops when it is decided, goes on where it was cut off, and films the episodes that it judged."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from paradiffpolicy.cli.asking import study_questions, study_tasks
from paradiffpolicy.cli.composing import compose, config_files
from paradiffpolicy.cli.main import main
from paradiffpolicy.control.record import Record
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.blocks import Blocks
from paradiffpolicy.evaluation.episodes import Episode
from paradiffpolicy.evaluation.realtime import realtime_rollout
from paradiffpolicy.evaluation.rollout import rollout
from paradiffpolicy.study.design import Arm, Question, arms_of, product, require_margin, require_seeds
from paradiffpolicy.study.filming import chosen_seeds, film, filmed
from paradiffpolicy.study.report import ArmFacts, lateness, report_values, verdict_table
from paradiffpolicy.study.running import ArmRun, Study

from .conftest import tiny_checkpoint
from .test_evaluation import tiny_policy
from .test_executors import Elsewhere
from .toy_env import ToyEnv, picture

SAMPLERS = {"ddpm": {}, "ddim": {"solver": "ddim"}, "four": {"n_steps": 4}}
TWO = ("ddpm", "ddim")
SEEDS = range(900_001, 900_008)


def toy_at(rate_hz):
    env = ToyEnv()
    env.control_hz = rate_hz
    return env


def asked(measure="score", margin=100.0, samplers=SAMPLERS) -> list[Question]:
    axes = {"task": ["toy"], "checkpoint": [None], "sampler": list(samplers)}
    return product(axes, {"sampler": "ddpm"}, measure, margin, "toy")


def runs_of(questions, bounds=(-1e4, 1e4)) -> dict[Arm, ArmRun]:
    runs = {}
    for arm in arms_of(questions):
        policy = tiny_policy(**SAMPLERS[arm.sampler])
        if arm.waits:
            run = partial(rollout, policy, max_steps=12, success_key="terminated")
            runs[arm] = ArmRun(policy, run, ToyEnv, 10, 12, bounds=bounds)
        else:
            timed = {"rate_hz": 10, "latencies": [arm.latency / 1e3], "success_key": "terminated"}
            run = partial(realtime_rollout, policy, seconds=1.2, **timed)
            runs[arm] = ArmRun(policy, run, toy_at, 10, 12, "on_ticks", bounds=bounds)
    return runs


def studied(questions, folder=None, **changes):
    given = {"seeds": SEEDS, "block": 4, "error": 0.05, "blocks": Blocks(folder, {}, "blocks")} | changes
    return Study(questions=questions, runs=runs_of(questions), **given).run()


def plain(progressed) -> dict:
    """All that a report says but what is of this process."""
    facts = {arm: ArmFacts({}) for arm in progressed.episodes}
    values = report_values({}, facts, progressed, {})
    for arm in values["arms"].values():
        del arm["programs"]
    return json.loads(json.dumps(values))


class CutOffError(Exception):
    """The study is killed."""


def test_a_study_that_is_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    """Between blocks, or within a round of them; elsewhere the same."""
    whole = plain(studied(asked(samplers=TWO)))
    assert [len(arm["episodes"]["seed"]) for arm in whole["arms"].values()] == [7, 7]
    assert {each["stopped"] for each in whole["questions"]} == {"budget"} and not whole["unfinished"]

    def cut(progressed):
        raise CutOffError

    with pytest.raises(CutOffError):
        studied(asked(samplers=TWO), tmp_path, on_block=cut)
    kept = sorted(path.name for path in (tmp_path / "blocks").glob("*.npz"))
    assert len(kept) == 2
    (tmp_path / "blocks" / kept[1]).unlink()
    elsewhere = Elsewhere()
    assert plain(studied(asked(samplers=TWO), tmp_path, executor=elsewhere)) == whole
    assert elsewhere.sizes == [1, 2]
    assert plain(studied(asked(samplers=TWO), tmp_path)) == whole
    shutil.rmtree(tmp_path / "blocks")


def test_an_arm_goes_on_while_a_question_needs_it():
    """Of ddim it is clear that its score is the reference's, of the other it isn't; the reference runs on."""
    easy, hard = asked(margin=16_000.0)
    hard = Question(hard.arm, hard.reference, "score", 1e-6)
    seen = []
    progressed = studied([easy, hard], seeds=range(900_000, 900_012), on_block=seen.append)
    counts = {arm.sampler: len(episodes) for arm, episodes in progressed.episodes.items()}
    assert counts["ddim"] < counts["ddpm"] == counts["four"] == 12
    assert progressed.answers[easy].claim == "equivalent" and progressed.answers[easy].n == counts["ddim"]
    assert [progressed.stopped(each) for each in (easy, hard)] == ["decided", "budget"]
    assert seen[0].stopped(hard) == "unfinished" and len(seen) == 3
    report = plain(progressed)
    assert report["arms"]["toy/ddim"]["iterations"]["values"] == [3]
    assert verdict_table(report, "").row_count == 2


def test_pairs_are_of_the_same_scene_and_noise():
    """Of an arm and itself under another name, nothing differs."""
    questions = [
        Question(arm, arm, "score", 1.0)
        for arm in (Arm("toy", None, "ddpm"), Arm("toy", None, "ddpm", 100.0, 10.0))
    ]
    progressed = studied(questions)
    assert all(answer.mean == 0 and answer.n == 7 for answer in progressed.answers.values())
    assert len(progressed.episodes) == 2


def test_motions_under_latency_are_kept(tmp_path):
    """They come from records, which aren't; where the world waits for plans there are none."""
    arms = Arm("toy", None, "ddpm"), Arm("toy", None, "ddpm", 100.0, 10.0)
    report = plain(studied([Question(arm, arm, "score", 1.0) for arm in arms], tmp_path))
    waits, late = (report["arms"][arm.name]["smoothness"] for arm in arms)
    assert waits is None and 0 < late["jump"]["n"] <= len(SEEDS) and late["jump"]["median"] > 0
    assert plain(studied([Question(arm, arm, "score", 1.0) for arm in arms], tmp_path)) == report


def test_questions_are_a_product_and_share_arms():
    axes = {
        "task": ["a", "b"],
        "checkpoint": [None],
        "sampler": ["ddpm", "rti"],
        "latency": ["unlimited", "measured"],
        "rate_hz": [10.0, 50.0],
    }
    waiting = product(axes, {"latency": "unlimited"}, "score", 0.1, "x")
    assert len(waiting) == 2 * 2 * 2 and {question.reference.rate_hz for question in waiting} == {None}
    ddpm = product(axes, {"sampler": "ddpm"}, "score", 0.1, "x")
    assert "a/rti, measured latency, 50 Hz against a/ddpm, measured latency, 50 Hz, score" in {
        question.name for question in ddpm
    }
    assert len(arms_of([*waiting, *ddpm])) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("axes", "reference", "message"),
    [
        ({"sampler": ["rti"]}, {"sampler": "ddpm"}, "the reference sampler 'ddpm' isn't in the question"),
        ({"sampler": ["ddpm"]}, {"sampler": "ddpm"}, "there is nothing beside the reference"),
        (
            {"sampler": ["ddpm", "rti"]},
            {"samplr": "ddpm"},
            "reference has no 'samplr'; did you mean 'sampler'",
        ),
    ],
)
def test_a_reference_must_be_in_its_question(axes, reference, message):
    with pytest.raises(InputError, match=message):
        product({"task": ["toy"], "checkpoint": [None], **axes}, reference, "score", 0.1, "question mine")


@pytest.mark.parametrize(
    ("measure", "margin", "bounds", "message"),
    [
        ("score", 0.0, (0, 1), "margin=0 of score on task 'toy' must be above 0 and below 1"),
        ("score", 2.5, (-1, 1), "margin=2.5 of score on task 'toy' must be above 0 and below 2"),
        ("success", 1.0, None, "margin=1 of success on task 'toy' must be above 0 and below 1"),
        ("score", 0.1, None, r"write reward_range: \[0, 1\] in the task's file, or ask about success"),
    ],
)
def test_a_margin_is_within_what_can_be(measure, margin, bounds, message):
    (question, *_) = asked(measure, margin)
    with pytest.raises(InputError, match=message):
        require_margin(question, bounds)


@pytest.mark.parametrize(
    ("first", "budget", "message"),
    [
        (299_999, 20, "hold some of the validation seeds 200000 to 299999.*first_seed=300000"),
        (199_990, 20, "seeds 199990 to 200009 of the study hold some"),
        (500_000, 9, "budget=9 seeds are fewer than one block=10"),
    ],
)
def test_seeds_are_fresh(first, budget, message):
    with pytest.raises(InputError, match=message):
        require_seeds(first, budget, 10, (200_000, 299_999))
    assert require_seeds(300_000, 20, 10, (200_000, 299_999)) == range(300_000, 300_020)


def test_scores_out_of_range_and_unknown_success_are_refused():
    questions = asked()
    runs = runs_of(questions, bounds=(0, 1))
    with pytest.raises(InputError, match=r"seed 90000\d of toy/ddpm has a score of .* reward_range=\[0, 1\]"):
        Study(questions=questions, runs=runs, seeds=SEEDS, block=4, error=0.05).run()
    questions = asked("success", 0.1)
    runs = runs_of(questions)
    for run in runs.values():
        run.run.keywords["success_key"] = None
    with pytest.raises(InputError, match="task 'toy' doesn't say whether an episode succeeded"):
        Study(questions=questions, runs=runs, seeds=SEEDS, block=4, error=0.05).run()


# ---------------------------------------------------------------------------------------------- videos


def test_an_action_is_late_when_the_next_tick_has_begun():
    record = Record(0, 2)
    for index, (deadline, ended, missed) in enumerate([(0.0, 0.03, 0), (0.1, 0.25, 1)]):
        record.add_tick(index, deadline, deadline, ended, missed, -1, -1, np.nan, 0, False, ())
    assert lateness(record, 10) == {"period_ms": 100, "lateness_ms": [-70, 50], "missed": 1}


def test_seeds_where_arms_disagree_come_first():
    def episodes(**outcomes):
        return [
            Episode(seed, score, success)
            for seed, (score, success) in enumerate(zip(*outcomes.values(), strict=True))
        ]

    arms = {
        Arm("toy", None, "a"): episodes(s=[0.2, 1, 1, 0.5, 1], b=[False, True, True, False, True]),
        Arm("toy", None, "b"): episodes(s=[0.3, 1, 0.1, 0.9, 0.2], b=[False, True, False, False, False]),
    }
    assert chosen_seeds(arms, 4) == [2, 4, 3, 0] and chosen_seeds(arms, 9)[-1] == 1


def test_a_film_is_of_the_episode_that_was_judged(tmp_path):
    """Also of one that simulated time went on in."""
    arms = [Arm("toy", None, "ddpm"), Arm("toy", None, "ddpm", 150.0, 10.0)]
    questions = [Question(arms[1], arms[0], "score", 1.0)]
    progressed, runs = studied(questions), runs_of(questions)
    for arm in arms:
        judged = {episode.seed: episode for episode in progressed.episodes[arm]}
        for episode in filmed(runs[arm], SEEDS[4:7], [900_006, 900_007], picture):
            assert episode.score == judged[episode.seed].score
            assert episode.n_steps == judged[episode.seed].n_steps == len(episode.rewards)
            assert max(episode.rewards) == episode.score and len(episode.frames) == episode.n_steps + 1
    made = film(progressed, runs, 4, 1, tmp_path, lambda env: np.zeros((64, 64, 3), np.uint8))
    assert [*made] == ["toy/ddpm", "toy/ddpm, 150 ms, 10 Hz"]
    for files in made.values():
        (path,) = files.values()
        assert (tmp_path / path).stat().st_size > 0


# --------------------------------------------------------------------------------------------- command


@pytest.fixture
def mine(tmp_path) -> Path:
    """A study of an untrained policy, in a file."""
    tiny_checkpoint().save(tmp_path / "tiny")
    (tmp_path / "mine.yaml").write_text(
        f"title: Mine\nsamplers: [rti_5, rti]\nreference: rti_5\ncheckpoints: ['{tmp_path}/tiny']\n"
        "margin: 0.5\nmax_steps: 8\nfirst_seed: 900000\nbudget: 4\nblock: 2\ncapture: eager\n"
        "latency_plans: 2\npaced_ticks: 2\n"
    )
    return tmp_path / "mine.yaml"


def said(capsys, *argv: str) -> str:
    code = main(["study", *argv])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert code in (0, 2)
    return captured.out if code == 0 else captured.err.rstrip().splitlines()[-1]


def test_a_study_writes_its_report(capsys, mine, tmp_path):
    given = [f"study={mine}", f"out={tmp_path / 'out'}"]
    out = said(capsys, *given, "latencies=[unlimited,measured]")
    assert "Mine" in out and "seeds used up" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [report[name] for name in ("format", "name", "first_seed", "budget")] == [1, "mine", 900_000, 4]
    name = f"pusht/{tmp_path}/tiny/rti"
    arm = report["arms"][f"{name}, measured latency"]
    assert len(arm["latency_ms"]) == arm["plan_latency_ms"]["n"] == 2 and arm["timeline"]["lateness_ms"]
    assert (
        arm["rate_hz"] == 10 and report["arms"][name]["rate_hz"] is None and len(arm["weights_sha256"]) == 64
    )
    assert arm["iterations"]["values"] and report["arms"][name]["nfe"]["values"]
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert len(report["questions"]) == 2 and report["videos"]["command"].endswith(" videos=8")
    again = said(capsys, *given, "latencies=[unlimited,measured]", "videos=1", "video_size=32", "budget=5")
    assert "report.json" in again
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["arms"][name]["score"]["n"] == 5
    files = [path for paths in report["videos"]["files"].values() for path in paths.values()]
    assert len(files) == 4 and all((tmp_path / "out" / path).exists() for path in files)
    assert "other settings (margin)" in said(capsys, *given, "latencies=[unlimited,measured]", "margin=0.4")
    tiny_checkpoint(seed=1).save(tmp_path / "other")
    shutil.rmtree(tmp_path / "tiny")
    shutil.move(tmp_path / "other", tmp_path / "tiny")
    line = said(capsys, *given, "latencies=[unlimited,measured]")
    assert "other settings (weights_sha256)" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samplers=[rti_5,rtj]"], "unknown sampler 'rtj'"),
        (["tasks=[pushd]"], "unknown task 'pushd'"),
        (["study=quik"], "unknown study 'quik'; did you mean 'quick'?"),
        (["reference=ddpm"], "question mine: the reference sampler 'ddpm' isn't in the question"),
        (["margin=0"], "margin=0 of score"),
        (["margin=1.5"], "margin=1.5 of score on task 'pusht' must be above 0 and below 1"),
        (["first_seed=250000"], "validation seeds 200000 to 299999"),
        (["validation_seeds=[2,1]"], "validation_seeds=[2, 1] must be [first, last]"),
        (["block=5"], "budget=4 seeds are fewer than one block=5"),
        (["latencies=[soon]"], "latencies=[soon] must be a list"),
        (["latencies=[unlimited,measured]", "latency_plans=0"], "latencies=measured need latency_plans"),
        (["checkpoints=[nowhere]"], "nowhere"),
    ],
)
def test_a_study_refuses_in_one_line_and_writes_nothing(capsys, mine, tmp_path, overrides, message):
    assert message in said(capsys, f"study={mine}", f"out={tmp_path / 'out'}", *overrides)
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_study_is_checked(capsys, tmp_path):
    bad = tmp_path / "bad.yaml"
    for text, message in (
        ("margn: 1", "there is no setting 'margn'"),
        ("budget: many", "budget=many must be"),
    ):
        bad.write_text(text)
        line = said(capsys, f"study={bad}")
        assert f"{bad}: " in line and message in line


@pytest.mark.parametrize("name", config_files("study"))
def test_shipped_studies_ask_what_can_be_asked(name):
    cfg = compose("study", [f"study={name}"])
    questions = study_questions(cfg)
    tasks = study_tasks(cfg)
    for question in questions:
        require_margin(question, tuple(tasks[question.arm.task].reward_range))
    assert cfg.first_seed >= 500_000 and cfg.title
    require_seeds(cfg.first_seed, cfg.budget, cfg.block, cfg.validation_seeds)

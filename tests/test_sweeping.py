"""--multirun: a run per combination, and one table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paradiffpolicy.cli.main import COMMANDS, dispatch, main
from paradiffpolicy.cli.sweeping import combinations, folder_name
from paradiffpolicy.errors import InputError
from paradiffpolicy.presets import presets

AUTO = [name for name, sampler in presets().items() if sampler.get("window") == "auto"]
SMALL = (
    "policy.diffusion_step_embed_dim=16 training.batch_size=8 augmentation=null evaluation.seeds=0 "
    "training.log_every=1 capture=eager " + " ".join(f"~sampler.{name}" for name in AUTO)
).split()


def test_every_combination_is_run_and_the_same_line_goes_on(capsys, toy_store, tmp_path):
    """Groups of 8 channels don't divide 20: those runs fail, the others don't."""
    words = ["train", "--multirun", f"dataset={toy_store}", f"run={tmp_path / 'runs'}", *SMALL]
    assert main([*words, "policy.down_dims=[16],[20]", "training.n_steps=range(1,3)"]) == 2
    said = capsys.readouterr()
    assert said.err.endswith("2 of 4 runs failed: their lines say why; run the same again\n")
    rows = json.loads((tmp_path / "runs" / "multirun.json").read_text())["runs"]
    assert [list(row["settings"].values()) for row in rows] == [
        [dims, steps] for dims in ("[16]", "[20]") for steps in ("1", "2")
    ]
    assert [row["step"] for row in rows] == [1, 2, None, None]
    for row in rows:
        dims, steps = row["settings"].values()
        assert Path(row["run"]).name.startswith(f"policy.down_dims=_{dims[1:-1]}_,training.n_steps={steps}")
        assert (row["last_loss"] is None) == (row["error"] is not None)
        assert row["error"] is None or row["error"] in said.err
    assert f"{rows[1]['last_loss']:.5g}" in said.out
    assert main([*words, "policy.down_dims=[16]", "training.n_steps=1,2", "training.seed=0"]) == 0


def test_values_are_hydras():
    swept = combinations(["a=1,2", "b=[16],[32,64]", "c=x y", "d='p,q',r", "run=/some/where (1)", "~e"])
    assert len(swept) == 8 and swept[0] == {"a": "1", "b": "[16]", "d": "'p,q'"}
    assert len({folder_name(each) for each in swept}) == 8
    assert all("/" not in folder_name({"a": value}) for value in ("/x", "../y", "z" * 500))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "training.seed=0"], "--multirun found no combinations"),
        (["train", "training.seed=range(0,100000)"], "--multirun found 100000 combinations, of 1 to 10000"),
        (["train", "training.seed=interval(0,1)"], "--multirun needs a list of values"),
        (["train", "training.seed=0,x"], "training.seed=x must be a whole number"),
        (
            ["train", "training.seed=0,1", "checkpoint=here"],
            "checkpoint=here: every run of --multirun would write",
        ),
        (["evaluate", "seeds=1,2"], "evaluate has no --multirun: train and distill have"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(capsys, monkeypatch, tmp_path, words, line):
    monkeypatch.setitem(COMMANDS, "train", lambda config: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    assert main([words[0], "--multirun", *words[1:]]) == 2
    assert line in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_processes_do_not_sweep(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(InputError, match="runs in one process"):
        dispatch(["train", "--multirun", "training.seed=0,1"])

"""``--multirun``: a command once for every combination of the settings' values, and one table of the runs.

Hydra's grammar says what a setting's values are: ``training.seed=0,1,2``, ``training.seed=range(0,3)``.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.errors import HydraException

from ..errors import InputError
from ..tables import publish, table
from .composing import compose
from .processes import by_torchrun
from .settings import require_outputs, settings_of

if TYPE_CHECKING:
    from rich.table import Table

SWEPT = ("train", "distill")
"""Commands that can be run so: each has a folder ``run``, from which it resumes."""
FLAGS = {"-m", "--multirun"}
REPORT = "multirun.json"
MOST_RUNS = 10_000


def multirun(command: str, overrides: Sequence[str], run: Callable[[Any], None]) -> None:
    """Runs a command for every combination, in a folder each below ``run``; if a run fails, the others go on.
    The same line again resumes what isn't finished.

    Args:
        run: the command, given its config.

    Raises:
        InputError: nothing is swept, or a combination isn't allowed, before anything runs; or, at the end,
            a run has failed.
    """
    if command not in SWEPT:
        raise InputError(f"{command} has no --multirun: {' and '.join(SWEPT)} have")
    if by_torchrun():
        raise InputError("--multirun runs in one process: start every combination with torchrun by itself")
    swept = combinations(overrides)
    plain = [override for override in overrides if name_of(override) not in swept[0]]
    configs = []
    for values in swept:
        config = compose(command, plain + [f"{name}={value}" for name, value in values.items()])
        for setting in settings_of(config):
            if setting.rule.writes and setting.name != "run" and setting.value is not None:
                raise InputError(f"{setting.name}={setting.value}: every run of --multirun would write there")
        config.run = str(Path(config.run) / folder_name(values))
        require_outputs(config)
        configs.append(config)
    rows = [one_run(run, *each) for each in zip(swept, configs, strict=True)]
    folder = Path(os.path.commonpath([Path(config.run).parent.absolute() for config in configs]))
    publish([runs_table(rows)], {"runs": rows}, folder / REPORT)
    failed = sum(row["error"] is not None for row in rows)
    if failed:
        raise InputError(f"{failed} of {len(rows)} runs failed: their lines say why; run the same again")


def name_of(override: str) -> str:
    """The left side of an override, with its sign."""
    return override.partition("=")[0]


def combinations(overrides: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the swept settings' values, as text by the settings' names.

    Raises:
        InputError: no override has several values, or they are too many, or can't be counted up.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            if parsed.is_sweep_override():
                values[name_of(override)] = [str(each) for each in parsed.sweep_iterator(_verbatim)]
        except HydraException as error:
            if "sweep" in str(error):  # an interval, or a glob
                raise InputError(f"{override}: --multirun needs a list of values, as training.seed=0,1,2")
    n = 1
    for each in values.values():
        n *= len(each)
    if not values or not 0 < n <= MOST_RUNS:
        raise InputError(
            f"--multirun found {n if values else 'no'} combinations, of 1 to {MOST_RUNS}: write several "
            "values, as training.seed=0,1,2"
        )
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _verbatim(value: Any) -> Any:
    return value if isinstance(value, str) else Transformer.str(value)


def folder_name(values: Mapping[str, str]) -> str:
    """A combination's folder: its settings, readable, and apart from every other's."""
    text = ",".join(f"{name}={value}" for name, value in values.items())
    name = re.sub(r"[^\w.,=+-]", "_", text)[:100]
    return name if name == text else f"{name}-{sha256(text.encode()).hexdigest()[:8]}"


def one_run(run: Callable[[Any], None], values: Mapping[str, str], config: Any) -> dict[str, Any]:
    """Runs one combination: its settings, folder, last loss and score, or why it failed."""
    print(f"--multirun: {config.run}", flush=True)
    error = None
    try:
        run(config)
    except InputError as failure:
        error = " ".join(str(failure).split())
        print(f"paradiffpolicy: {error}", file=sys.stderr, flush=True)
    return {"settings": dict(values), "run": config.run, **outcome(Path(config.run)), "error": error}


def outcome(folder: Path) -> dict[str, Any]:
    """How far a run came, its last loss and its last score; None: it has none."""
    from ..checkpoint import read_description

    try:
        training = read_description(folder / "checkpoint").info.get("training", {})
    except InputError:  # nothing was saved yet
        training = {}
    score = (training.get("scores") or [{}])[-1]
    return {
        "step": training.get("step"),
        "last_loss": (training.get("loss_curve") or [[None, None]])[-1][1],
        "score": score.get("score"),
        "standard_error": score.get("standard_error"),
    }


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run: the settings that differ, and what came of them."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    shown = (
        {
            **row["settings"],
            "step": cell(row["step"], "d"),
            "last loss": cell(row["last_loss"], ".5g"),
            "score": cell(row["score"], ".3f"),
            "s.e.": cell(row["standard_error"], ".3f"),
            "failed": "" if row["error"] is None else "yes",
        }
        for row in rows
    )
    return table("runs", shown)

"""A study's page: its report as one HTML file that needs no server, no network and no other program.

The file holds the report as JSON, and the style and the programs of ``page/``, which draw it in the browser.
What the report says, names among it, is only ever put into the page as text.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..errors import InputError, is_number, is_whole
from ..files import contained, exists, plain_json, write_atomically

FORMAT = 1
"""Of the reports that are shown."""
LARGEST_PAGE = 3_000_000
"""Bytes up to which videos are put into the page."""
MOST_LATENCIES = 1000
"""Latencies of an arm that its histogram is drawn from."""
MOST_TICKS = 3000
"""Points of an arm's timeline."""
PARTS = ("page.css", "svg.js", "plots.js", "grid.js", "page.js")
"""Files of ``page/`` that are put into ``page.html``, where it names them."""


def write_page(report: Mapping[str, Any], path: Path, *, videos_from: Path | None = None) -> Path:
    """Writes a study's report as one HTML file.

    Args:
        report: the content of report.json.
        path: of the HTML file.  Videos that aren't in it are looked for relative to its folder.
        videos_from: the folder that the report's paths of videos start from.  Videos are put into the page,
            seed by seed, while it stays below ``LARGEST_PAGE`` bytes.  None: none are.

    Returns:
        ``path``.

    Raises:
        InputError: it isn't a report of a study, or the page can't be written.
    """
    check(report)
    content = shown(report)
    text = render(content)
    if videos_from is not None:
        content["videos"]["embedded"] = embedded(report, videos_from, LARGEST_PAGE - len(text.encode()))
        text = render(content)
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))
    return path


def render(content: Mapping[str, Any]) -> str:
    """The HTML of what ``shown`` returns."""
    # "<" would begin "</script>" or "<!--"; what is left of JSON says the same within a script's element.
    data = json.dumps(plain_json(content), separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(str(content.get("title") or content["name"]).encode("utf-8", "replace").decode())
    folder = files(__package__) / "page"
    inserts = {name: (folder / name).read_text("utf-8") for name in PARTS} | {"report": data, "title": title}
    # In one pass: what is inserted isn't searched for further names.
    names = re.compile(r"\{\{(" + "|".join(map(re.escape, inserts)) + r")\}\}")
    return names.sub(lambda found: inserts[found[1]], (folder / "page.html").read_text("utf-8"))


# ------------------------------------------------------------------------------------------ what is shown


def shown(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a report: long lists of latencies and ticks are thinned, scores rounded."""
    arms = {name: shown_arm(arm) for name, arm in report["arms"].items()}
    videos = report.get("videos") or {}
    return {
        **report,
        "arms": arms,
        "videos": {
            "command": videos.get("command"),
            "files": dict(videos.get("files") or {}),
            "embedded": {},
        },
    }


def shown_arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    """An arm as the page needs it."""
    episodes, latency, timeline = arm["episodes"], arm.get("plan_latency_ms"), arm.get("timeline")
    values = dict(arm)
    values["episodes"] = {
        **episodes,
        "score": [None if score is None else round(score, 4) for score in episodes["score"]],
        "success": [None if success is None else int(success) for success in episodes["success"]],
    }
    if latency:
        values["plan_latency_ms"] = {**latency, "values": spread_thin(latency["values"], MOST_LATENCIES)}
    if timeline:
        late, every = worst_of_groups(timeline["lateness_ms"], MOST_TICKS)
        values["timeline"] = {**timeline, "lateness_ms": late, "every": every}
    return values


def spread_thin(values: Sequence[float], most: int) -> list[float]:
    """At most ``most`` values with the same distribution: evenly spaced quantiles."""
    if len(values) <= most:
        return list(values)
    return [round(float(value), 4) for value in np.quantile(values, np.linspace(0, 1, most))]


def worst_of_groups(values: Sequence[float], most: int) -> tuple[list[float], int]:
    """The largest of every so many values, at most ``most`` of them, and how many that is."""
    every = max(1, -(-len(values) // most))
    return [max(values[start : start + every]) for start in range(0, len(values), every)], every


def embedded(report: Mapping[str, Any], folder: Path, room: int) -> dict[str, dict[str, str]]:
    """Videos as ``data:`` addresses, by arm and seed: as many as have room.

    Args:
        folder: that the paths start from.
        room: bytes.

    Raises:
        InputError: a path leads out of the folder.
    """
    found: dict[str, dict[str, str]] = {}
    for arm, seed, name in videos(report):
        path = folder / name
        if not exists(path) or not contained(path, folder).is_file():
            continue
        room_needed = 4 * -(-path.stat().st_size // 3) + len(json.dumps(arm)) + 50
        if room_needed > room:
            continue
        room -= room_needed
        data = base64.b64encode(path.read_bytes()).decode()
        found.setdefault(arm, {})[seed] = f"data:video/mp4;base64,{data}"
    return found


def videos(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Arm, seed and path of every video: all arms of a seed, then those of the next."""
    listed = (report.get("videos") or {}).get("files") or {}
    for seed in dict.fromkeys(seed for by_seed in listed.values() for seed in by_seed):
        for arm, by_seed in listed.items():
            if seed in by_seed:
                yield arm, seed, by_seed[seed]


# --------------------------------------------------------------------------------------------- the checks

MEASURES = ("score", "success")
"""What a question may compare."""
REMEDY = "write it again with paradiffpolicy study"


def require(holds: bool, what: str) -> None:
    """Raises ``InputError`` unless it holds."""
    if not holds:
        raise InputError(f"the study's report can't be shown ({what}): {REMEDY}")


def check(report: Mapping[str, Any]) -> None:
    """Raises ``InputError`` unless a report has what the page reads, each of its kind."""
    require(isinstance(report, Mapping), "it isn't a mapping")
    require(report.get("format") == FORMAT, f"format={report.get('format')!r} in place of {FORMAT}")
    arms, questions = report.get("arms"), report.get("questions")
    require(is_text(report.get("name")), "it has no name")
    require(isinstance(arms, Mapping) and len(arms) > 0, "it has no arms")
    require(isinstance(questions, Sequence), "it has no list of questions")
    assert isinstance(arms, Mapping) and isinstance(questions, Sequence)
    for name, arm in arms.items():
        check_arm(f"arm {name!r}", arm)
    for index, question in enumerate(questions):
        check_question(f"question {index + 1}", question, arms)
    check_videos(report)


def check_arm(where: str, arm: Any) -> None:
    """Raises ``InputError`` that begins with ``where`` unless it is an arm."""
    require(isinstance(arm, Mapping), f"{where} isn't a mapping")
    need(where, arm, {"task": is_text, "sampler": is_text, "score": is_mapping, "episodes": is_mapping})
    need(f"{where}: score", arm["score"], {"n": is_whole, "mean": maybe(is_number)})
    episodes = arm["episodes"]
    need(f"{where}: episodes", episodes, {"seed": list_of(is_whole), "score": list_of(maybe(is_number))})
    need(f"{where}: episodes", episodes, {"success": list_of(maybe(is_truth)), "n_steps": list_of(is_whole)})
    lengths = {len(episodes[name]) for name in ("seed", "score", "success", "n_steps")}
    require(len(lengths) == 1, f"{where}: lists of episodes of different lengths")
    for name in ("iterations", "nfe"):
        counted = arm.get(name) or {"values": [], "counts": []}
        require(is_mapping(counted), f"{where}: {name} isn't a mapping")
        need(f"{where}: {name}", counted, {key: list_of(is_number) for key in ("values", "counts")})
        require(len(counted["values"]) == len(counted["counts"]), f"{where}: {name} lacks counts")
    lists = {"plan_latency_ms": "values", "timeline": "lateness_ms"}
    for name, key in lists.items():
        if arm.get(name) is not None:
            require(is_mapping(arm[name]), f"{where}: {name} isn't a mapping")
            need(f"{where}: {name}", arm[name], {key: list_of(is_number)})
    if arm.get("plan_latency_ms"):
        need(f"{where}: plan_latency_ms", arm["plan_latency_ms"], {"p50": is_number})
    if arm.get("success") is not None:
        require(is_mapping(arm["success"]), f"{where}: success isn't a mapping")
        kinds = {"mean": maybe(is_number), "interval_95": list_of(is_number)}
        need(f"{where}: success", arm["success"], kinds)


def check_question(where: str, question: Any, arms: Mapping[str, Any]) -> None:
    """Raises ``InputError`` that begins with ``where`` unless it is a question about these arms."""
    require(isinstance(question, Mapping), f"{where} isn't a mapping")
    need(where, question, {"arm": one_of(arms), "reference": one_of(arms), "measure": one_of(MEASURES)})
    need(where, question, {"margin": is_number, "n": is_whole, "mean": maybe(is_number), "verdict": is_text})
    need(where, question, {"interval": list_of(maybe(is_number)), "confidence": is_number})
    require(len(question["interval"]) == 2, f"{where}: interval isn't two numbers")


def check_videos(report: Mapping[str, Any]) -> None:
    """Raises ``InputError`` unless all paths of videos are relative ones that stay in their folder."""
    listed = report.get("videos") or {}
    require(is_mapping(listed), "videos isn't a mapping")
    files_of = listed.get("files") or {}
    require(is_mapping(files_of) and all(map(is_mapping, files_of.values())), "videos aren't by arm and seed")
    for arm, seed, name in videos(report):
        inside = is_text(name) and not name.startswith(("/", "\\")) and ".." not in Path(name).parts
        require(
            inside and not urlsplit(name).scheme, f"the video of {arm!r}, seed {seed}, isn't a relative path"
        )


def need(where: str, values: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raises ``InputError`` that names the first value that is missing or of another kind."""
    for name, holds in kinds.items():
        require(name in values and holds(values[name]), f"{where}: {name}={values.get(name)!r:.40}")


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def is_truth(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def one_of(names: Collection[str]) -> Callable[[Any], bool]:
    """A check for a name that is known."""
    return lambda value: is_text(value) and value in names


def maybe(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check that null passes, too; NaN and infinity are written as null."""
    return lambda value: value is None or (isinstance(value, float) and value != value) or holds(value)


def list_of(holds: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """A check of every value of a list."""
    return lambda values: isinstance(values, list | tuple) and all(map(holds, values))

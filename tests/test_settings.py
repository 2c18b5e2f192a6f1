"""Settings: every wrong value of every setting of every command is refused; paths may hold any character."""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from dataclasses import asdict, is_dataclass, replace

import pytest

from paradiffpolicy.cli.composing import compose, dotted_names, overridden
from paradiffpolicy.cli.main import main
from paradiffpolicy.cli.parts import BLENDING, INTERPOLATION
from paradiffpolicy.cli.schema import SCHEMAS
from paradiffpolicy.cli.settings import declarations, declared, settings_of
from paradiffpolicy.errors import InputError

from .conftest import UNMEASURED, make_toy_store, tiny_checkpoint

WRONG = [
    "0",
    "-1",
    "nan",
    "inf",
    "-inf",
    "1e12",
    "null",
    "2.5",
    "[]",
    "{}",
    "''",
    "true",
    "abc",
    "[nan]",
    "[abc]",
]
FREE = {"min_score", "lambda_min", "start", "stop", "limits"}
"""Numbers without a least value."""

OPTIONS = {
    ("tolerance", "2.5"),
    ("plan_tolerance", "2.5"),
    ("plan_tolerance", "null"),
    ("start", "null"),
    ("warm_iterations", "null"),
    ("checkpoint", "abc"),
}
"""What may be, of the wrong values of a sampler's options."""

default = functools.cache(lambda command: compose(command, []))
values_of = functools.cache(lambda command: asdict(default(command)))


def every_setting():
    """``(command, dotted name, Setting)``; commands share settings, samplers of a driver their options."""
    seen = {}
    for command, schema in SCHEMAS.items():
        for name in dotted_names(values_of(command)):
            if name == "task":  # a file's name, not a value
                continue
            setting = declared(schema, name)
            driver = (
                values_of(command)["sampler"][name.split(".")[1]].get("driver", "")
                if name[:8] == "sampler."
                else ""
            )
            key = (
                setting.rule,
                str(setting.hint),
                name.rpartition(".")[2] if name.count(".") > 1 else name,
                driver,
            )
            seen.setdefault(key, (command, name, setting))
    return seen.values()


def given(command: str, name: str, text: str):
    """The value of the setting, or of the part of the config, that an override changes."""
    whole = declarations(SCHEMAS[command])[name.split(".")[0]]
    values = overridden(command, values_of(command), f"{name}={text}")
    value = replace(whole, value=values[whole.name]).checked(default(command))
    for part in name.split(".")[1:]:
        value = getattr(value, part) if is_dataclass(value) else value[part]
    return value


def may_be(setting, hint, text: str) -> bool:
    """Whether a value of ``WRONG`` is right after all."""
    rule, kind, inner = setting.rule, typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(may_be(setting, each, text) for each in inner)
    if kind is list:
        if rule.path:
            return text not in ("null", "[nan]")
        entry = text[1:-1] if text in ("[nan]", "[abc]") else text
        if text == "[]":
            return not rule.some
        if typing.get_origin(inner[0]) is list:
            return False
        if inner[0] is not str:
            return not is_dataclass(inner[0]) and may_be(setting, inner[0], entry)
        return rule.choices is None and entry in ("''", "abc")
    if kind is str:
        anything = rule.choices is None and rule.check is None and not rule.suffixes
        return anything and text != "null" and not (rule.path and text == "''")
    if kind in (int, float):
        number = float(text) if text in ("0", "-1", "2.5", "1e12") else math.nan
        return rule.holds(number) and (kind is float or text in ("0", "-1"))
    if kind is typing.Any:
        return (setting.name, text) in OPTIONS or setting.name == "obs_type"
    if kind is dict:
        return text == "{}" and not rule.some and rule.check not in (BLENDING, INTERPOLATION)
    return text == {types.NoneType: "null", bool: "true"}.get(kind, "{}")


def test_no_wrong_value_is_taken_and_none_ends_in_a_traceback():
    wrong = []
    for command, name, setting in every_setting():
        for text in WRONG:
            try:
                given(command, name, text)
                taken = True
            except InputError as error:
                taken = False
                assert name.split(".")[0] in str(error) and "\n" not in str(error)
            except Exception as error:
                taken = repr(error)
            if taken is not may_be(setting, setting.hint, text):
                wrong.append(f"{command} {name}={text}: {taken}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_number_has_a_least_value(command):
    for setting in settings_of(default(command)):
        if re.search(r"\b(int|float)\b", str(setting.hint)) and setting.name.split(".")[-1] not in FREE:
            assert max(setting.rule.minimum, setting.rule.above) > -math.inf, setting.name


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("evaluate", "realtime.clock=nonsense"),
        ("evaluate", "realtime.cases.rti.latency_ms=nan"),
        ("evaluate", "realtime.sweep.blendings.rtc.overlap=-1"),
        ("evaluate", "sampler.speculative.window=2.5"),
        ("evaluate", "margin=inf"),
        ("evaluate", "task.max_steps=nan"),
        ("run", "anytime=[]"),
        ("run", "robot_address=arm"),
        ("run", "seed=4294967296"),
        ("train", "training.seed=-1"),
        ("train", "evaluation.sampler=null"),
        ("bench latency", "steady.shipped=-1"),
    ],
)
def test_what_the_mode_at_hand_doesnt_use_is_checked_too(command, override):
    sign = "+" if "overlap" in override else ""
    with pytest.raises(InputError, match=override.partition("=")[0].split(".")[-1]):
        compose(command, [sign + override])


# ------------------------------------------------------------------------------------------- paths

ODD = "é 世 ( ) , ' [ ] # = {x} $ & \\"
"""Every character that means something to some reader of a command line."""


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_path_is_taken_verbatim(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/é")
    for setting in settings_of(default(command)):
        suffix = (*setting.rule.suffixes, "")[0]
        if setting.rule.path:
            for text, wanted in (
                (f"/tmp/{ODD}{suffix}", f"/tmp/{ODD}{suffix}"),
                (f"[{ODD}{suffix}", f"[{ODD}{suffix}"),
                (f"~/{ODD}{suffix}", f"/home/é/{ODD}{suffix}"),
                (f"2024{suffix}", f"2024{suffix}"),
                (f"1e3{suffix}", f"1e3{suffix}"),
                (f"true{suffix}", f"true{suffix}"),
            ):
                assert given(command, setting.name, text) in (wanted, [wanted]), (setting.name, text)


def test_commands_read_and_write_under_any_name(tmp_path, monkeypatch, capsys):
    odd = tmp_path / ODD
    odd.mkdir()
    make_toy_store(odd / "toy.zarr")
    (odd / "own.yaml").write_text(
        "name: toy\ncontrol_hz: 10\nobservation: [{key: state}]\ndataset: toy.zarr\n"
    )
    monkeypatch.setenv("HOME", str(odd))
    monkeypatch.chdir(odd)
    small = ["policy.down_dims=[8]", "policy.diffusion_step_embed_dim=8", "policy.n_groups=4", *UNMEASURED]
    train = ["train", f"task={odd}/own.yaml", *small, "training.n_steps=1", "evaluation.seeds=0"]
    assert main([*train, "run=~/run", f"checkpoint={odd}/2024", f"dataset={odd}/toy.zarr"]) == 0
    assert main([*train, "run=2024/run", "init=~/2024"]) == 0
    tiny_checkpoint().save(odd / "tiny")
    common = [f"checkpoint={odd}/tiny", "capture=eager", f"capture_cache={odd}/cache"]
    short = [
        "samplers=ddim",
        "reference=ddim",
        "seeds=1",
        "task.max_steps=8",
        "latency_plans=0",
        "paced_ticks=0",
    ]
    assert main(["evaluate", *common, *short, "videos=1", f"out={odd}/report"]) == 0
    assert (
        main(["run", *common, "seconds=0.2", "planner=inline", "record=~/r=.zarr", "video=r,.mp4", "out=~/d"])
        == 0
    )
    assert main(["convert", "source=~/r=.zarr", "actions=recorded", f"out={odd}/c'.zarr"]) == 0
    assert main(["info", "r=.zarr", "c'.zarr", f"{odd}/run/checkpoint", "~/2024", "paths=~/tiny"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("r=.zarr", "c'.zarr", "run/checkpoint", "2024", "tiny"))
    made = {path.name for path in odd.iterdir()}
    assert made >= {"run", "2024", "report", "r=.zarr", "r,.mp4", "d", "c'.zarr"} and "~" not in made


def test_what_isnt_text_isnt_a_path():
    for override in ("dataset=null", "run=null", "run=", "checkpoint=''"):
        command, name = ("train", override.partition("=")[0])
        if override == "dataset=null":
            assert compose(command, [override]).dataset is None
            continue
        with pytest.raises(InputError, match=f"^{name}="):
            compose(command, [override])


def test_entries_of_a_list_may_have_any_letter_too():
    for text in ("höhe,weite", "[höhe,weite]"):
        assert given("convert", "obs_keys", text) == ["höhe", "weite"]
    with pytest.raises(InputError, match=re.escape("unknown sampler '[ddim'")):
        given("evaluate", "samplers", "[ddim")

"""The command line: parses, composes the config, and runs a command."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, first_line, nearest
from ..files import exists
from .bench import (
    bench_control,
    bench_envs,
    bench_latency,
    bench_serve,
    bench_soak,
    bench_solvers,
    bench_train,
)
from .collect import collect
from .composing import compose
from .convert import convert
from .download import download
from .evaluate import evaluate
from .export import export
from .help import entry as help_entry
from .help import settings_help, width
from .hub import pull, push
from .info import info
from .processes import one_of_several, speaks
from .run import StoppedError, run
from .schema import SCHEMAS
from .serve import serve
from .settings import require_outputs
from .study import study
from .sweeping import FLAGS, SWEPT, multirun
from .train import distill, train

COMMANDS: dict[str, Callable[[Any], None]] = {
    "train": train,
    "distill": distill,
    "evaluate": evaluate,
    "study": study,
    "run": run,
    "collect": collect,
    "download": download,
    "convert": convert,
    "push": push,
    "pull": pull,
    "export": export,
    "serve": serve,
    "info": info,
    "bench latency": bench_latency,
    "bench control": bench_control,
    "bench soak": bench_soak,
    "bench solvers": bench_solvers,
    "bench serve": bench_serve,
    "bench envs": bench_envs,
    "bench train": bench_train,
}
"""What runs every command, given its config."""


def usage() -> str:
    """The commands, each with the first sentence of its description."""
    lines = [help_entry(name, description(name)[0].split(". ")[0].rstrip(".") + ".", 16) for name in COMMANDS]
    return "\n".join(
        [
            "paradiffpolicy COMMAND [NAME=VALUE ...]",
            "paradiffpolicy --version",
            "",
            *lines,
            "",
            "paradiffpolicy COMMAND --help says more, with examples and every setting.",
        ]
    )


def description(name: str) -> tuple[str, str]:
    """A command's description, and its examples."""
    text, _, examples = (inspect.getdoc(SCHEMAS[name]) or "").partition("\n\n")
    return " ".join(text.split()), examples


def command_help(name: str) -> str:
    """A command's description, examples and settings."""
    words = f" [{WORDS[name].removesuffix('s').upper()} ...]" if name in WORDS else ""
    words += " [--multirun]" if name in SWEPT else ""
    text, examples = description(name)
    title = f"paradiffpolicy {name}{words} [NAME=VALUE ...]"
    return "\n\n".join([title, textwrap.fill(text, width()), examples, settings_help(compose(name, []))])


WORDS = {"download": "datasets", "info": "paths"}
"""The setting that a command's words without = go to."""


def main(argv: list[str] | None = None) -> int:
    """Runs the console command; returns the exit code, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return dispatch(argv)
    except InputError as error:
        if speaks(error):
            print(f"paradiffpolicy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        name = signal.Signals(stop.args[0]).name
        print(f"paradiffpolicy: stopped by {name}; what was recorded until then is written", file=sys.stderr)
        return 128 + int(stop.args[0])
    except BrokenPipeError:  # as of '--help | head'
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  nothing fails at exit
        return 0
    except (MemoryError, RuntimeError) as error:  # PyTorch's and pygame's lack of memory is a RuntimeError
        line = first_line(error)
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate", line, re.I):
            raise
        if speaks(error):
            print(f"paradiffpolicy: the memory isn't there ({line[:200]}): smaller sizes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paradiffpolicy: interrupted", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    """Runs the command that the arguments name, or prints help."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), flush=True)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"paradiffpolicy {__version__}")
        return 0
    n_words = 2 if any(command.startswith(f"{argv[0]} ") for command in COMMANDS) else 1
    name, overrides = " ".join(argv[:n_words]), argv[n_words:]
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    if {"-h", "--help"} & set(overrides):
        print(command_help(name), flush=True)
        return 0
    if FLAGS & set(overrides):
        multirun(name, [word for word in overrides if word not in FLAGS], COMMANDS[name])
        return 0
    words: dict[str, list[str]] = {}
    if name in WORDS:
        words[WORDS[name]] = [word for word in overrides if "=" not in word or exists(Path(word))]
        overrides = [word for word in overrides if word not in words[WORDS[name]]]
    with one_of_several(compose(name, overrides, **words)) as cfg:
        require_outputs(cfg)
        COMMANDS[name](cfg)
    return 0

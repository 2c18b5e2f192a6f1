"""Runs pages' steps with the package that is installed: ``python -P walk.py`` with a script for bash on
standard input.

The shell's commands ``paradiffpolicy`` and ``python`` are forks of this process, which has imported what they
need: starting each would take seconds.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback

import imageio  # noqa: F401
import matplotlib.pyplot as plt  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import paradiffpolicy.envs.pusht
import paradiffpolicy.evaluation.report
import paradiffpolicy.training.train
from paradiffpolicy.cli.main import main

SHELL = r"""
ask() { printf '%s\0' "$PWD" "$@" >&$ASKED; printf '\1\n' >&$ASKED; read -r code <&$TOLD; return "$code"; }
python() { if [ "$1" = - ]; then cat > stdin.py; set -- stdin.py; fi; ask python "$@"; }
paradiffpolicy() { ask paradiffpolicy "$@"; }
"""


def run(folder: str, program: str, *words: str) -> int:
    """A command, in this process."""
    os.chdir(folder)
    if program == "paradiffpolicy":
        return main(list(words))
    sys.path.insert(0, folder)
    runpy.run_path(words[0], run_name="__main__")
    return 0


def forked(words: list[str]) -> int:
    """The exit code of a command that runs in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = run(*words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def walk(script: str) -> int:
    """The exit code of the shell."""
    (asked, ask), (told, tell) = os.pipe(), os.pipe()
    environment = {**os.environ, "ASKED": str(ask), "TOLD": str(told)}
    shell = subprocess.Popen(["/bin/bash", "-c", SHELL + script], pass_fds=(ask, told), env=environment)
    os.close(ask)
    os.close(told)
    with os.fdopen(asked) as requests, os.fdopen(tell, "w") as answers:
        for line in requests:
            print(forked(line.split("\0")[:-1]), file=answers, flush=True)
    return shell.wait()


if __name__ == "__main__":
    sys.stdout.write(f"{paradiffpolicy.__file__}\n")
    sys.stdout.flush()
    sys.exit(walk(sys.stdin.read()))

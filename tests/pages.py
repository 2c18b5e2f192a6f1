"""Reads README and docs for the tests: blocks of code, and the files and steps that readers make of them."""

from __future__ import annotations

import re
from pathlib import Path

from .conftest import ROOT

PAGES = (
    "README.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    "checkpoints/README.md",
)

BLOCK = re.compile(
    r"(?P<step><!-- step -->\n)?^```(?P<kind>\w+) ?(?P<name>\S*)\n(?P<body>.*?)^```$", re.M | re.S
)
"""A block of code.  ``python reach.py`` names the file to save it as.  ``<!-- step -->`` marks what a reader
runs in the page's order, in an empty folder, with the package installed."""


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, kind: str) -> list[re.Match[str]]:
    return [match for match in BLOCK.finditer(read(page)) if match["kind"] == kind]


def save_files(page: str, folder: Path) -> None:
    """Writes the blocks that have a file's name."""
    for match in BLOCK.finditer(read(page)):
        if match["name"]:
            (folder / match["name"]).write_text(match["body"])


def steps(page: str) -> str:
    """The page's steps as one script for bash, which needs ``paradiffpolicy`` and ``python``."""
    script = ["set -e"]
    for match in BLOCK.finditer(read(page)):
        if match["step"]:
            body = match["body"]
            script.append(f"python - <<'PY'\n{body}PY" if match["kind"] == "python" else body)
    return "\n".join(script)

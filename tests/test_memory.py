"""Datasets that are ten times larger than the memory that reading them may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT, SIZE = 16, 160
"""Megabytes."""

CHILD = """
import json, re, sys
from pathlib import Path

import numpy as np

from paradiffpolicy.data.formats.demonstration import About, Demonstration
from paradiffpolicy.data.formats.reading import open_source, write

EPISODES, STEPS = 101, 200


def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def demonstrations(count):
    state = np.zeros((STEPS, 1000))
    for index in range(count):
        yield Demonstration(f"demo_{index}", np.ones((STEPS, 2)), {"observation.state": state})


def converted(suffix, count):
    place = folder / f"{count}{suffix}"
    write(place, demonstrations(count), about)
    source = open_source(place)
    other = ".zarr" if suffix == ".npz" else ".npz"
    write(folder / f"from_{place.name}{other}", map(source.read, source.demos), about)


folder, suffix, about = Path(sys.argv[1]), sys.argv[2], About(actions="recorded", control_hz=10.0)
converted(suffix, 3)  # what is imported and cached once
Path("/proc/self/clear_refs").write_text("5")  # the peak is of what follows
before = memory("VmRSS")
converted(suffix, EPISODES)
size = EPISODES * STEPS * 1002 * 8 / 1e6
print(json.dumps({"grown": memory("VmHWM") - before, "size": size}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("suffix", [".zarr", ".lerobot", ".npz"])
def test_a_dataset_is_written_and_read_in_a_tenth_of_its_size(suffix, tmp_path):
    """Of the process's real memory: pyarrow's and zarr's buffers count.  pyarrow's own allocator, which takes
    24 MB at once whether they are needed or not, is left out."""
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    words = [sys.executable, "-c", CHILD, str(tmp_path), suffix]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["size"] >= SIZE and found["grown"] < LIMIT, found

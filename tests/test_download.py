"""Published datasets come from a server of this machine: whole, in parts, damaged, and made to harm."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import stat
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from paradiffpolicy.cli.composing import compose
from paradiffpolicy.cli.main import main
from paradiffpolicy.data import published as module
from paradiffpolicy.data.formats.reading import open_source
from paradiffpolicy.data.published import DATASETS, Published, default_folder, digest, download
from paradiffpolicy.data.transfer import PIECE, fetch
from paradiffpolicy.data.zipped import unpack
from paradiffpolicy.errors import InputError
from paradiffpolicy.files import lock

from .test_damaged_data import MUTANTS, mutated, v2_store
from .test_formats import demonstration, env_args, write_robomimic

INSIDE = "pusht/mine.zarr"
get = partial(download, schemes=("http",))


@dataclass
class Site:
    """A server's one file, and how it answers.

    Attributes:
        cuts: bytes after which each of the first answers ends.
        ranges: whether parts are sent.
        headers: of every request so far.
    """

    content: bytes
    tag: str | None = '"1"'
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    status: int | None = None
    redirect: str | None = None
    headers: list[dict[str, str]] = field(default_factory=list)
    address: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = dict(request.headers)
        self.headers.append(asked)
        if self.status or self.redirect:
            request.send_response(self.status or 302)
            request.send_header("Location", self.redirect or "")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start, total = 0, len(self.content)
        if self.ranges and "Range" in asked and asked.get("If-Range") == self.tag:
            start = int(asked["Range"].removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.tag:
            request.send_header("ETag", self.tag)
        request.send_header("Content-Length", str(total - start))
        request.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else total
        request.wfile.write(self.content[start:end])


@contextmanager
def serving(site: Site):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.answer(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}/files/demos.zip"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    """A store of two episodes in a zip file, beside files that aren't of it."""
    folder = tmp_path_factory.mktemp("archive")
    steps = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    store = v2_store(folder / "mine.zarr", {"action": steps, "state": steps}, [5, 12])
    with zipfile.ZipFile(folder / "demos.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("pusht")
        file.writestr("__MACOSX/._mine", b"nothing")
        file.writestr("pusht/large.bin", np.random.default_rng(1).bytes(3 * PIECE))
        for each in sorted(path for path in store.rglob("*") if path.is_file()):
            file.write(each, f"{INSIDE}/{each.relative_to(store)}")
    return (folder / "demos.zip").read_bytes()


@pytest.fixture
def site(archive):
    with serving(Site(archive)) as made:
        yield made


def mine(site: Site, **changes) -> Published:
    made = Published(site.address, "mine.zarr", 2, 12, ("state",), "MIT", INSIDE)
    return replace(made, **changes)


def left(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.iterdir())


MADE = ["mine.zarr", "mine.zarr.download.json"]

# ---------------------------------------------------------------------------------------- what is known


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_known_of_each_dataset(name):
    known = DATASETS[name]
    assert known.address.startswith("https://") and len(known.sha256 or "") == 64 and known.size
    assert known.episodes and known.steps and known.keys and known.licence
    observed = {each.key for each in compose("train", [f"task={name}"]).task.observation}
    assert observed <= set(known.keys)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("named", [True, False])
def test_train_looks_where_it_is_put(name, named, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if named:
        monkeypatch.setenv("PARADIFFPOLICY_DATA", str(tmp_path / "data"))
    else:
        monkeypatch.delenv("PARADIFFPOLICY_DATA", raising=False)
        (tmp_path / "shared/data").mkdir(parents=True)
    place = default_folder() / DATASETS[name].name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    assert compose("train", [f"task={name}"]).dataset == str(place)


def test_a_collected_dataset_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARADIFFPOLICY_DATA", str(tmp_path))
    assert compose("train", ["task=lift"]).dataset == "outputs/collect/lift.zarr"
    (tmp_path / DATASETS["lift"].name).touch()
    (tmp_path / "outputs/collect/lift.zarr").mkdir(parents=True)
    assert compose("train", ["task=lift"]).dataset == "outputs/collect/lift.zarr"


# ------------------------------------------------------------------------------------------ the transfer


def test_a_whole_file_is_unpacked_checked_and_remembered(site, tmp_path):
    heard = []
    line = get(mine(site), tmp_path, on_bytes=lambda *now: heard.append(now))
    assert line == f"{tmp_path / 'mine.zarr'}: 2 episodes, 12 steps" and left(tmp_path) == MADE
    assert heard[-1] == (len(site.content), len(site.content)) and len(heard) > 2
    source = open_source(tmp_path / "mine.zarr")
    assert source.keys == ["state"] and len(source.read("demo_1")) == 7
    about = json.loads((tmp_path / MADE[1]).read_text())
    assert about["size"] == len(site.content) and about["made_sha256"] == digest(tmp_path / "mine.zarr")
    assert "as it was when it was downloaded" in get(mine(site), tmp_path) and len(site.headers) == 1


def test_a_file_that_isnt_packed_is_put_in_place_as_it_is(tmp_path):
    write_robomimic(tmp_path / "demos.hdf5", [demonstration(), demonstration("demo_1", 4)], env_args(), {})
    with serving(Site((tmp_path / "demos.hdf5").read_bytes())) as site:
        sha256, out = digest(tmp_path / "demos.hdf5"), tmp_path / "out"
        wanted = mine(site, name="mine.hdf5", steps=10, keys=("object",), inside=None, sha256=sha256)
        get(wanted, out)
        assert digest(out / "mine.hdf5") == sha256
        (out / "mine.hdf5.download.json").unlink()
        assert "it is kept" in get(wanted, out)
        with pytest.raises(InputError, match="its SHA-256 isn't the published"):
            get(replace(wanted, sha256="0" * 64), out)
        assert left(out) == ["mine.hdf5"]


def test_a_transfer_that_is_cut_goes_on(site, tmp_path):
    site.cuts = [PIECE + 10, PIECE]
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE
    asked = [(headers.get("Range"), headers.get("If-Range")) for headers in site.headers]
    assert asked == [(None, None), (f"bytes={PIECE + 10}-", '"1"'), (f"bytes={2 * PIECE + 10}-", '"1"')]


def test_the_same_command_goes_on_with_what_an_earlier_one_left(site, tmp_path):
    site.cuts = [PIECE, 0, 0]
    with pytest.raises(InputError, match=f"broke off.*{PIECE} bytes are there: run this again"):
        get(mine(site), tmp_path)
    assert left(tmp_path) == [".download-mine.zarr"]
    site.cuts, site.headers = [], []
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE and [each["Range"] for each in site.headers] == [f"bytes={PIECE}-"]


def test_a_server_that_always_cuts_is_given_up(site, tmp_path):
    site.cuts = [1] * 99
    with pytest.raises(InputError, match="5 bytes are there"):
        get(mine(site), tmp_path)
    assert len(site.headers) == 5


@pytest.mark.parametrize("change", ["no ranges", "no tag", "another tag", "another size", "damaged note"])
def test_parts_that_may_not_fit_are_taken_anew(change, site, tmp_path):
    site.cuts = [PIECE, 0]
    with pytest.raises(InputError, match="broke off"):
        get(mine(site), tmp_path)
    site.cuts = []
    note = tmp_path / ".download-mine.zarr/part.json"
    if change == "no ranges":
        site.ranges = False
    elif change == "no tag":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"validator": None}))
    elif change == "another tag":
        site.tag = '"2"'
    elif change == "another size":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"size": 10**7}))
    else:
        note.write_text("{")
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE


def test_a_part_that_is_longer_than_the_file_is_taken_anew(site, tmp_path):
    site.cuts = [PIECE, 0]
    with pytest.raises(InputError, match="broke off"):
        get(mine(site), tmp_path)
    (tmp_path / ".download-mine.zarr/part").write_bytes(bytes(len(site.content) + 9))
    answer = site.answer

    def strict(request):
        if "Range" in request.headers:
            site.headers.append({})
            request.send_error(416)
        else:
            answer(request)

    site.answer = strict
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE


def test_a_server_that_sends_another_part_is_given_up(site, tmp_path):
    site.cuts = [PIECE, 0]
    with pytest.raises(InputError, match="broke off"):
        get(mine(site), tmp_path)
    site.cuts = []

    def wrong(request):
        request.send_response(206)
        request.send_header("Content-Range", "bytes 5-9/10")
        request.send_header("Content-Length", "5")
        request.end_headers()
        request.wfile.write(b"12345")

    site.answer = wrong
    with pytest.raises(InputError, match="another file at every answer"):
        get(mine(site), tmp_path)


def test_only_https_is_fetched_from_by_default_and_redirected_to(site, tmp_path):
    with pytest.raises(InputError, match="isn't an address with https"):
        download(mine(site), tmp_path)
    with pytest.raises(InputError, match="isn't an address with https"):
        download(mine(site, address="file:///etc/passwd"), tmp_path)
    site.redirect = "ftp://127.0.0.1/x"
    with pytest.raises(InputError, match="isn't an address with http:"):
        get(mine(site), tmp_path)
    assert left(tmp_path) == []


def test_a_redirection_is_followed_with_the_part_that_is_asked_for(site, tmp_path):
    site.cuts = [PIECE]
    with serving(Site(b"", redirect=site.address)) as first:
        get(mine(first), tmp_path)
    assert left(tmp_path) == MADE and site.headers[1]["Range"] == f"bytes={PIECE}-"


def test_offline_one_line_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with serving(Site(b"")) as site:
        wanted = mine(site)
    with pytest.raises(InputError) as caught:
        get(wanted, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{wanted.address} can't be reached (") and "\n" not in line
    assert line.endswith(f"fetch it by hand, as {tmp_path / 'demos.zip'}, and run this again")
    with pytest.raises(InputError, match=r"fetch it by hand, as .*mine\.zarr, and"):
        get(replace(wanted, inside=None), tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_server_that_refuses_is_quoted(status, site, tmp_path):
    site.status = status
    with pytest.raises(InputError, match=f"answers {status} .*: fetch it by hand, as"):
        get(mine(site), tmp_path)
    assert left(tmp_path) == []


def test_what_was_fetched_by_hand_is_checked_and_unpacked(site, archive, tmp_path):
    (tmp_path / "demos.zip").write_bytes(archive)
    get(mine(site), tmp_path)
    assert left(tmp_path) == ["demos.zip", *MADE] and not site.headers
    shutil.rmtree(tmp_path / MADE[0])
    (tmp_path / MADE[1]).unlink()
    with pytest.raises(InputError, match=r"demos\.zip has the SHA-256"):
        get(mine(site, sha256="0" * 64), tmp_path)
    assert left(tmp_path) == ["demos.zip"]


# ------------------------------------------------------------------------------------- what is refused


WRONG = {
    "size": ({"size": 77}, "bytes, 77 are expected"),
    "checksum": ({"sha256": "0" * 64}, "has the SHA-256"),
    "episodes": ({"episodes": 3}, "2 episodes and 12 steps, not 3 and 12"),
    "steps": ({"steps": 13}, "not 2 and 13"),
    "field": ({"keys": ("keypoint",)}, "keypoint"),
    "folder": ({"inside": "pusht/other.zarr"}, "has no folder pusht/other.zarr"),
    "form": ({"inside": None, "name": "mine.hdf5"}, "isn't what it should be (mine.hdf5 is not an HDF5"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_content_is_not_put_in_place(wrong, site, tmp_path):
    changes, words = WRONG[wrong]
    with pytest.raises(InputError) as caught:
        get(mine(site, **changes), tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert left(tmp_path) == []
    get(mine(site), tmp_path)


def test_more_than_is_expected_is_not_taken(site, tmp_path):
    with pytest.raises(InputError, match=f"more than {PIECE} bytes"):
        fetch(site.address, tmp_path / "part", most=PIECE, remedy="", schemes=("http",))
    assert (tmp_path / "part").stat().st_size <= PIECE


def test_another_file_than_last_time_is_not_taken(site, tmp_path):
    get(mine(site), tmp_path)
    (tmp_path / "mine.zarr").rename(tmp_path / "away")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("x", "x")
    site.content, site.tag = (tmp_path / "x.zip").read_bytes(), '"2"'
    with pytest.raises(InputError, match=r"isn't the file that was downloaded before.*remove .*\.json"):
        get(mine(site), tmp_path)
    assert not (tmp_path / "mine.zarr").exists()


def test_what_is_there_is_kept_and_named_if_it_isnt_the_dataset(site, tmp_path):
    get(mine(site), tmp_path)
    (tmp_path / "mine.zarr/data/action/0.0").write_bytes(b"changed")
    with pytest.raises(InputError, match="isn't as it was when it was downloaded: move it away"):
        get(mine(site), tmp_path)
    (tmp_path / MADE[1]).unlink()
    with pytest.raises(InputError, match="is there already, and another dataset"):
        get(mine(site), tmp_path)
    shutil.rmtree(tmp_path / "mine.zarr")
    (tmp_path / "mine.zarr").symlink_to("nowhere")
    with pytest.raises(InputError, match="is there already"):
        get(mine(site), tmp_path)
    assert left(tmp_path) == ["mine.zarr"] and len(site.headers) == 1
    (tmp_path / MADE[1]).write_text("[")
    with pytest.raises(InputError, match=r"download\.json can't be read"):
        get(mine(site), tmp_path)


def test_one_download_at_a_time(site, tmp_path):
    work = tmp_path / ".download-mine.zarr"
    work.mkdir()
    held = lock(work)
    with pytest.raises(InputError, match="is being downloaded by another process"):
        get(mine(site), tmp_path)
    os.close(held)
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE


def test_a_full_disk_is_named_before_and_what_came_is_kept(site, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"has room for \d+ bytes"):
        get(mine(site, size=2**60), tmp_path)
    assert left(tmp_path) == [] and not site.headers

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "unpack", full)
        with pytest.raises(InputError, match="No space left on device"):
            get(mine(site), tmp_path)
    assert left(tmp_path) == [".download-mine.zarr"]
    get(mine(site), tmp_path)
    assert left(tmp_path) == MADE and len(site.headers) == 1


# ------------------------------------------------------------------------------------------- zip files


def entry(name, mode=0, **changes):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def zipped(path, *entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{INSIDE}/a", b"good")
        for info, content in entries:
            file.writestr(info, content)
    return path


HOSTILE = {
    "parent": (entry(f"{INSIDE}/../../../x"), b"x", "leads out"),
    "parent elsewhere": (entry("../x"), b"x", "leads out"),
    "absolute": (entry("/tmp/x"), b"x", "leads out"),
    "backslash": (entry(f"{INSIDE}\\..\\x"), b"x", "leads out"),
    "link": (entry(f"{INSIDE}/x", stat.S_IFLNK | 0o777), b"/etc", "is a link"),
    "pipe": (entry(f"{INSIDE}/x", stat.S_IFIFO), b"", "is a link, or no file"),
    "folder that is a file": (entry(f"{INSIDE}/x/", stat.S_IFREG), b"", "is a link, or no file"),
    "lzma": (entry(f"{INSIDE}/x", compress_type=zipfile.ZIP_LZMA), b"x", "packed in a way"),
    "bomb": (entry(f"{INSIDE}/x", compress_type=zipfile.ZIP_DEFLATED), bytes(2**20), "most that is unpacked"),
    "file in a file": (entry(f"{INSIDE}/a/b"), b"x", "two entries of one name"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("fault", [*HOSTILE, "twice", "many"])
def test_a_hostile_zip_file_is_refused_before_anything_is_unpacked(fault, tmp_path):
    if fault == "twice":
        path, words = zipped(tmp_path / "x.zip", (entry(f"{INSIDE}/a"), b"x")), "two entries of one name"
    elif fault == "many":
        more = [(entry(f"{INSIDE}/{index}"), b"") for index in range(9)]
        path, words = zipped(tmp_path / "x.zip", *more), "unpacks to 10 files"
    else:
        *made, words = HOSTILE[fault]
        path = zipped(tmp_path / "x.zip", made)
    with pytest.raises(InputError, match=words):
        unpack(path, INSIDE, tmp_path / "out", most_bytes=2**19, most_files=9)
    assert left(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("declared", [64, 2**18])
def test_an_entry_that_unpacks_to_more_or_less_than_it_declares_is_refused(declared, tmp_path):
    large = entry(f"{INSIDE}/x", compress_type=zipfile.ZIP_DEFLATED)
    path = zipped(tmp_path / "x.zip", (large, bytes(2**17)))
    content = path.read_bytes()
    path.write_bytes(content.replace((2**17).to_bytes(4, "little"), declared.to_bytes(4, "little")))
    with pytest.raises(InputError, match=f"{INSIDE}/x"):
        unpack(path, INSIDE, tmp_path / "out", most_bytes=2**19, most_files=9)
    assert all(file.stat().st_size <= max(declared, 2**17) for file in (tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    packed = [(entry(f"{INSIDE}/{k}/x", compress_type=zipfile.ZIP_DEFLATED), bytes(99)) for k in range(3)]
    return zipped(tmp_path_factory.mktemp("small") / "x.zip", *packed).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutant=MUTANTS)
def test_a_mutated_zip_file_is_unpacked_or_refused(mutant, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutant")
    (folder / "x.zip").write_bytes(mutated(small, mutant))
    try:
        unpack(folder / "x.zip", INSIDE, folder / "out", most_bytes=2**24, most_files=99)
    except InputError as error:
        assert "\n" not in str(error)
    assert set(left(folder)) <= {"x.zip", "out"}


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def _known(archive, tmp_path):
    """A dataset of which the file is there, fetched by hand."""
    (tmp_path / "demos.zip").write_bytes(archive)
    DATASETS.register("mine", mine(Site(b"", address="https://nowhere.invalid/demos.zip")))
    yield
    DATASETS._choices.pop("mine")


@pytest.mark.usefixtures("_known")
def test_the_command_puts_each_dataset_in_place_and_lists_them(tmp_path, capsys):
    assert main(["download", "mine", f"out={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine.zarr'}: 2 episodes, 12 steps\n"
    assert main(["download", f"out={tmp_path}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pusht" in said and "lift" in said and "yes" in said


def test_the_command_refuses_what_it_doesnt_know_and_ends_with_2(tmp_path, capsys):
    assert main(["download", "pushed", f"out={tmp_path}"]) == 2
    assert "unknown dataset 'pushed'; did you mean 'pusht'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["download", "pusht", f"out={tmp_path / 'file'}"]) == 2
    assert "can't be written" in capsys.readouterr().err

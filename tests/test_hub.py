"""Checkpoints on the Hugging Face Hub, with the real client and a server on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml

import paradiffpolicy as pdp
from paradiffpolicy.checkpoint import METADATA, Checkpoint
from paradiffpolicy.cli import locating
from paradiffpolicy.cli.main import main
from paradiffpolicy.errors import InputError
from paradiffpolicy.evaluation.card import checkpoint_report
from paradiffpolicy.interchange import diffusion_policy, reading
from paradiffpolicy.interchange.hub import HubName
from paradiffpolicy.interchange.reading import read_checkpoint

from . import hub_server
from .conftest import SHIPPED, TINY, fixtures, tiny_checkpoint
from .foreign import ckpt, lerobot

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub isn't installed")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and an empty cache and working folder."""
    with hub_server.serving() as hub:
        url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has plain HTTP alone
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        huggingface_hub.close_session()
        locating._found.cache_clear()
        yield hub
    huggingface_hub.close_session()
    locating._found.cache_clear()


def student(folder):
    """A checkpoint with a student, in folders of ours."""
    tiny_checkpoint().save(folder)
    spec = replace(TINY, prediction="sample", student_timesteps=(99.0,))
    tiny_checkpoint(spec, seed=1).save(folder / "student")
    return folder


def failed(words, capsys) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ----------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lerobot/diffusion_pusht", HubName("lerobot/diffusion_pusht")),
        ("me/Reach-2.5@v1.0", HubName("me/Reach-2.5", "v1.0")),
        ("me/reach@refs/pr/1", HubName("me/reach", "refs/pr/1")),
        ("me/reach/a/epoch=1-score=0.9.ckpt", HubName("me/reach", None, "a/epoch=1-score=0.9.ckpt")),
        ("me/reach/last.ckpt@main", HubName("me/reach", "main", "last.ckpt")),
    ],
)
def test_names_on_the_hub(text, name):
    assert HubName.parse(text) == name
    assert str(name) == text


PATHS = (
    *("pretrained_model", "./me/reach", "../me/reach", "/me/reach", "~/reach", "me/reach/", "me/a/b"),
    *("outputs/train/pusht/checkpoint", "data/mine.zarr", "data/demo.hdf5", "outputs/last.ckpt"),
    *("me/reach.git", "me/a--b", "me/.hidden", "me/re ach", f"me/{'a' * 97}", "me/reach\n"),
    *("me/reach@", "me/reach@../../x", "me/reach@-x", "me/reach/../../x.ckpt"),
)


@pytest.mark.parametrize("text", PATHS)
def test_paths_are_no_names(text):
    assert HubName.parse(text) is None


# -------------------------------------------------------------------------------------------- reading


def test_a_checkpoint_of_lerobots(hub):
    """The same as its folder is; only what is needed is downloaded, the weights last."""
    folder = fixtures("lerobot/0.4.4-state_env")
    hub.add("lerobot/pusht", folder)
    checkpoint = read_checkpoint("lerobot/pusht")
    local = read_checkpoint(folder)
    assert checkpoint.spec == local.spec and checkpoint.action_normalizer == local.action_normalizer
    assert all(torch.equal(each, local.weights[name]) for name, each in checkpoint.weights.items())
    sent = hub.sent()
    assert sent[0] == "config.json" and sent[-1] == "model.safetensors"
    assert set(sent[1:-1]) <= {path.name for path in folder.glob("policy_*")}
    assert read_checkpoint("lerobot/pusht") == checkpoint and hub.sent() == []


def test_a_policy_that_isnt_supported_is_refused_before_its_weights_come(hub, tmp_path):
    hub.add("lerobot/act", lerobot(tmp_path / "act", type="act"))
    with pytest.raises(InputError, match=r"lerobot/act, config.json: type='act': only diffusion policies"):
        read_checkpoint("lerobot/act")
    assert hub.sent() == ["config.json"]


def test_a_folder_of_ours_with_its_student(hub, tmp_path):
    folder = student(tmp_path / "policy")
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    hub.add("me/reach", folder)
    assert read_checkpoint("me/reach") == Checkpoint.load(folder)
    assert "report/report.json" not in hub.sent()
    assert Checkpoint.load(reading.found("me/reach") / "student") == Checkpoint.load(folder / "student")
    policy = pdp.load_policy("me/reach", capture="eager", warm_up=False)
    assert policy.spec == TINY


def test_a_revision(hub, tmp_path):
    first, second = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1)
    first.save(tmp_path / "policy")
    repo = hub.add("me/reach", tmp_path / "policy")
    repo.revisions["v1"] = repo.revisions["main"]
    second.save(tmp_path / "policy")
    repo.commit({path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()})
    assert read_checkpoint("me/reach@v1") == read_checkpoint(f"me/reach@{repo.revisions['v1']}")
    assert read_checkpoint("me/reach@v1") != read_checkpoint("me/reach")
    with pytest.raises(InputError, match="me/reach on the Hugging Face Hub has no revision v2"):
        read_checkpoint("me/reach@v2")


def test_files_of_diffusion_policy(hub, tmp_path):
    (tmp_path / "run").mkdir()
    path = ckpt(tmp_path / "run" / "a.ckpt")
    repo = hub.add("me/run", tmp_path / "run")
    assert read_checkpoint("me/run") == read_checkpoint(path)
    repo.commit({f"checkpoints/epoch={k}.ckpt": path.read_bytes() for k in range(12)})
    named = "name one of them, as me/run/a.ckpt"
    with pytest.raises(InputError, match=rf"13 .ckpt files \(a.ckpt, checkpoints/.* and 3 more\): {named}"):
        read_checkpoint("me/run")
    third = read_checkpoint("me/run/checkpoints/epoch=3.ckpt")
    assert third.info["origin"]["file"] == "epoch=3.ckpt"
    assert replace(third, info={}) == replace(read_checkpoint(path), info={})
    with pytest.raises(InputError, match=r"me/run has no file 'b.ckpt'"):
        read_checkpoint("me/run/b.ckpt")


def test_a_repository_without_a_checkpoint(hub, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.md").write_text("hello")
    hub.add("me/text", tmp_path / "text")
    with pytest.raises(InputError, match="me/text has no checkpoint that is known here"):
        read_checkpoint("me/text")


@pytest.mark.usefixtures("hub")
def test_a_mistyped_path_says_that_nothing_is_there(capsys):
    line = failed(["info", "checkpoints/pushed"], capsys)
    assert "nothing is at checkpoints/pushed, and the Hugging Face Hub has no model of this name" in line
    assert "Hub" not in failed(["export", "checkpoint=checkpoints/a/b", "out=new"], capsys)
    assert "nothing is at me/a/b.ckpt" in failed(["serve", "checkpoint=me/a/b.ckpt"], capsys)


def test_what_is_here_is_never_looked_for_there(hub, tmp_path):
    tiny_checkpoint().save(tmp_path / "here" / "me" / "reach")
    assert read_checkpoint("me/reach").spec == TINY
    assert hub.asked == []


def test_private_repositories(hub, tmp_path, monkeypatch):
    tiny_checkpoint().save(tmp_path / "policy")
    hub.add("me/reach", tmp_path / "policy", private=True)
    assert read_checkpoint("me/reach").spec == TINY
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match=r"no model of this name that you may see.* 'hf auth login'"):
        read_checkpoint("me/reach")


@pytest.mark.usefixtures("hub")
def test_without_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    remedy = "huggingface_hub isn't installed: pip install 'paradiffpolicy[hub]'"
    line = failed(["info", "me/reach"], capsys)
    assert line.startswith("paradiffpolicy: nothing is at me/reach") and line.endswith(remedy)
    assert failed(["push", f"checkpoint={SHIPPED}", "repo=me/reach"], capsys).endswith(remedy)
    assert "Hub" not in failed(["export", "checkpoint=nowhere", "out=new"], capsys)


@pytest.mark.parametrize("how", ["unreachable", "told to be"])
def test_offline(hub, tmp_path, monkeypatch, capsys, how):
    """What was downloaded works; for the rest it is said that the Hub can't be reached."""
    hub.add("me/reach", student(tmp_path / "policy"))
    online = read_checkpoint("me/reach")
    if how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
    hub.asked.clear()
    assert read_checkpoint("me/reach") == online
    assert main(["pull", "repo=me/reach", "out=there"]) == 0
    assert Checkpoint.load("there/student") == Checkpoint.load(tmp_path / "policy" / "student")
    line = failed(["info", "me/other"], capsys)
    assert "nothing is at me/other, and the Hugging Face Hub can't be reached" in line
    assert hub.asked == []


def test_sizes_are_bounded_before_anything_is_downloaded(hub, tmp_path, monkeypatch):
    ckpt(tmp_path / "a.ckpt")
    repo = hub.add("me/run", tmp_path)
    monkeypatch.setattr(diffusion_policy, "LARGEST_FILE", 1000)
    with pytest.raises(InputError, match=r"me/run: a.ckpt has \d+ bytes, 1000 are the most that is read"):
        read_checkpoint("me/run")
    assert hub.sent() == []
    repo.said["a.ckpt"] = 900
    with pytest.raises(InputError, match=r"a.ckpt has \d+ bytes, 1000 are the most that is read"):
        read_checkpoint("me/run")


def test_wrong_sizes(hub, tmp_path):
    folder = lerobot(tmp_path / "theirs")
    repo = hub.add("lerobot/reach", folder)
    repo.cut["model.safetensors"] = 1000
    with pytest.raises(InputError, match=r"model.safetensors can't be downloaded .* has size 1000"):
        read_checkpoint("lerobot/reach")
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    repo.cut.clear()
    (size,) = (path.stat().st_size for path in folder.glob("model.*"))
    repo.said["model.safetensors"] = size + 1
    with pytest.raises(InputError, match=rf"has {size} bytes, but lerobot/reach {size + 1}: remove it"):
        read_checkpoint("lerobot/reach")


def test_weights_that_arent_those_of_the_description(hub, tmp_path):
    tiny_checkpoint().save(tmp_path / "policy")
    repo = hub.add("me/reach", tmp_path / "policy")
    (name,) = (path.name for path in (tmp_path / "policy").glob("weights-*"))
    repo.commit({name: b"other"})
    with pytest.raises(InputError, match="truncated or changed"):
        read_checkpoint("me/reach")
    assert main(["pull", "repo=me/reach", "out=there"]) == 2
    assert list((tmp_path / "here").iterdir()) == []


# --------------------------------------------------------------------------------------- push and pull


def test_what_is_pushed_is_what_is_pulled(hub, tmp_path, capsys):
    folder = student(tmp_path / "policy")
    (folder / "notes.txt").write_text("mine")
    (folder / "presets").mkdir()
    (folder / "presets" / "report.json").write_text("{}")
    assert main(["push", f"checkpoint={folder}", "repo=me/reach", "license=mit"]) == 0
    printed = capsys.readouterr().out
    files = hub.repos["me/reach"].commits[hub.repos["me/reach"].revisions["main"]]
    ours = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.name == METADATA}
    ours |= {path.relative_to(folder).as_posix(): path for path in folder.rglob("weights-*")}
    assert files.keys() == {*ours, "README.md"}
    said, done = printed.split("uploaded: ")
    assert f"to {hub.endpoint}/me/reach (public" in said and done.startswith(
        f"{hub.endpoint}/me/reach/commit"
    )
    for name, content in files.items():
        (row,) = (line for line in said.splitlines() if f" {name} " in line)
        assert f" {len(content)} " in row
    assert main(["pull", "repo=me/reach", "out=there"]) == 0
    out = tmp_path / "here" / "there"
    pulled = {path.relative_to(out).as_posix(): path for path in out.rglob("*.*")}
    assert pulled.keys() == ours.keys()
    assert all(path.read_bytes() == ours[name].read_bytes() for name, path in pulled.items())
    assert not any(path.is_symlink() for path in pulled.values())
    assert Checkpoint.load("there") == Checkpoint.load(folder)


def test_a_card(hub, capsys):
    assert main(["push", f"checkpoint={SHIPPED}", "repo=me/pusht", "license=mit"]) == 0
    capsys.readouterr()
    repo = hub.repos["me/pusht"]
    card = repo.commits[repo.revisions["main"]]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "paradiffpolicy",
        "pipeline_tag": "robotics",
        "license": "mit",
        "tags": ["robotics", "diffusion-policy", "real-time", "pusht"],
    }
    assert 'pdp.load_policy("me/pusht")' in text
    about = json.loads((SHIPPED / METADATA).read_text())
    assert about["weights"]["sha256"] in text and about["info"]["dataset"]["fingerprint"] in text
    assert json.loads((SHIPPED / "student" / METADATA).read_text())["weights"]["sha256"] in text
    assert "`keypoint` (18 numbers, px), `state` (2 numbers, px)." in text
    report = json.loads((SHIPPED / "presets" / "report.json").read_text())
    for name, values in report["samplers"].items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {values['score']['mean']:.3f} ± " in row
        if name != report["reference"]:
            assert values["success_difference_to_reference"]["verdict"] in row
    assert "seeds 400000 to 400199" in text


def test_a_card_shows_no_report_of_other_weights(hub, tmp_path):
    tiny_checkpoint().save(tmp_path / "policy")
    (tmp_path / "policy" / "presets").mkdir()
    report = (SHIPPED / "presets" / "report.json").read_bytes()
    (tmp_path / "policy" / "presets" / "report.json").write_bytes(report)
    assert main(["push", f"checkpoint={tmp_path / 'policy'}", "repo=me/reach"]) == 0
    repo = hub.repos["me/reach"]
    card = repo.commits[repo.revisions["main"]]["README.md"].decode()
    assert "There is no report of these weights." in card and "license" not in card
    repo.commit({"README.md": b"by hand"})
    assert main(["push", f"checkpoint={tmp_path / 'policy'}", "repo=me/reach", "card=false"]) == 0
    assert repo.commits[repo.revisions["main"]]["README.md"] == b"by hand"


def test_a_card_shows_no_report_of_disturbed_episodes(tmp_path):
    content = json.loads((SHIPPED / "presets" / "report.json").read_text())
    (tmp_path / "presets").mkdir()
    for disturbances, shown in (({}, True), ({"friction": 1}, False)):
        report = content | {"disturbances": disturbances}
        (tmp_path / "presets" / "report.json").write_text(json.dumps(report))
        assert bool(checkpoint_report(tmp_path, content["weights_sha256"])) == shown


def test_private_stays_private(hub, tmp_path, capsys):
    tiny_checkpoint().save(tmp_path / "policy")
    words = ["push", f"checkpoint={tmp_path / 'policy'}", "private=true"]
    assert main([*words, "repo=me/secret"]) == 0
    assert hub.repos["me/secret"].private
    public = hub.repos["me/public"] = hub_server.Repo()
    assert "me/public exists and is public" in failed([*words, "repo=me/public"], capsys)
    assert public.commits == {}


def test_nothing_is_pushed_that_is_refused(hub, tmp_path, monkeypatch, capsys):
    tiny_checkpoint().save(tmp_path / "policy")
    lerobot(tmp_path / "theirs")
    words = ["push", "repo=me/reach", f"checkpoint={tmp_path / 'policy'}"]
    assert "must be OWNER/NAME alone" in failed([*words, "repo=me/reach@v1"], capsys)
    assert "repo=reach must be a name" in failed([*words, "repo=reach"], capsys)
    assert "paradiffpolicy convert" in failed([*words, f"checkpoint={tmp_path / 'theirs'}"], capsys)
    assert "no policy is named" in failed([*words, "checkpoint=null"], capsys)
    (weights,) = (tmp_path / "policy").glob("weights-*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert "truncated or changed" in failed(words, capsys)
    assert hub.asked == []
    weights.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "'hf auth login'" in failed(words, capsys)
    assert hub.repos == {}


def test_a_folder_that_exists_is_never_pulled_over(hub, tmp_path, capsys):
    tiny_checkpoint().save(tmp_path / "policy")
    hub.add("me/reach", tmp_path / "policy")
    (tmp_path / "here" / "there").mkdir()
    assert "there exists: choose another path" in failed(["pull", "repo=me/reach", "out=there"], capsys)
    assert "no folder is named" in failed(["pull", "repo=me/reach"], capsys)
    assert hub.asked == []


def test_a_file_is_pulled_into_a_folder(hub, tmp_path):
    (tmp_path / "run").mkdir()
    path = ckpt(tmp_path / "run" / "a.ckpt")
    hub.add("me/run", tmp_path / "run")
    assert main(["pull", "repo=me/run/a.ckpt", "out=there"]) == 0
    assert (tmp_path / "here" / "there" / "a.ckpt").read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------------------- commands


def test_info_describes_what_is_on_the_hub(hub, tmp_path, capsys):
    tiny_checkpoint().save(tmp_path / "policy")
    hub.add("me/reach", tmp_path / "policy")
    for words in (["me/reach"], ["checkpoint=me/reach", "dataset=null"]):
        assert main(["info", *words]) == 0
        assert "down_dims" in capsys.readouterr().out


def test_a_command_takes_one_commit(hub, tmp_path):
    """Also where it looks for its checkpoint several times, and the repository changes meanwhile."""
    tiny_checkpoint().save(tmp_path / "policy")
    repo = hub.add("me/reach", tmp_path / "policy")
    place = locating.locate_checkpoint("me/reach")
    repo.commit({"README.md": b"new"})
    assert locating.locate_checkpoint("me/reach") == place != reading.found("me/reach")
    assert place.name in repo.commits

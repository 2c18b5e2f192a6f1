"""A study's page: what is written, and what a browser makes of it."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import imageio.v2 as imageio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paradiffpolicy.errors import InputError
from paradiffpolicy.study import page as study_page
from paradiffpolicy.study.page import PARTS, spread_thin, worst_of_groups, write_page

from .conftest import ROOT
from .study_report import sample_arm, sample_report

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => color.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = rgba(getComputedStyle(each).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  for (const element of document.querySelectorAll("body *:not(script):not(option)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const a = luminance(rgba(element instanceof SVGElement ? style.fill : style.color));
    const b = luminance(ground(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.getAttribute("class")}`;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}"""
"""The lowest contrast of every kind of text to the nearest opaque background."""


PLAYABLE = """() => new Promise((done) => {
  const video = document.querySelector("dialog video");
  if (!video || video.readyState >= 2) done(Boolean(video));
  video?.addEventListener("loadeddata", () => done(true));
  video?.addEventListener("error", () => done(false));
})"""
"""Whether the dialog's video can be played."""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study's folder: its page, and one of the two videos that the report names."""
    made = tmp_path_factory.mktemp("study")
    (made / "videos").mkdir()
    video = made / "videos" / "pusht_rti_500003.mp4"
    imageio.mimwrite(video, [np.full((32, 32, 3), 60 * k, np.uint8) for k in range(4)], fps=10)  # type: ignore[arg-type]
    write_page(sample_report(), made / "report.html")
    return made


def opened(browser, path, width, scheme="light"):
    """A page with what it logged, failed at and asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown = context.new_page()
    seen = SimpleNamespace(errors=[], requests=[])
    shown.on("console", lambda message: seen.errors.append(message.text))
    shown.on("pageerror", lambda error: seen.errors.append(str(error)))
    shown.on("request", lambda request: seen.requests.append(request.url))
    shown.set_default_timeout(20_000)
    seen.measure = context.new_cdp_session(shown)
    seen.measure.send("Performance.enable", {"timeDomain": "threadTicks"})
    shown.goto(path.as_uri())
    return shown, seen


def seconds_of_page(seen):
    """Time on a processor that loading and drawing took, which doesn't depend on what else runs."""
    metrics = seen.measure.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime")


@pytest.fixture(scope="module")
def wide(browser, folder):
    shown, seen = opened(browser, folder / "report.html", 1280)
    yield shown
    assert seen.errors == []
    allowed = {(folder / "report.html").as_uri(), (folder / "videos" / "pusht_rti_500003.mp4").as_uri()}
    assert {url.split("#")[0] for url in seen.requests if not url.startswith("data:")} <= allowed


@pytest.fixture(scope="module")
def narrow(browser, folder):
    shown, seen = opened(browser, folder / "report.html", 380, scheme="dark")
    yield shown
    assert [error for error in seen.errors if "ERR_FILE_NOT_FOUND" not in error] == []  # the missing video


# ------------------------------------------------------------------------------------------ in a browser


def test_verdicts_come_first_in_plain_words(wide):
    assert wide.locator("h2").all_inner_texts() == [
        "Verdicts",
        "Differences",
        "Reward and latency",
        "Episodes",
        "Cost of a plan",
        "What was run",
        "How to read this page",
    ]
    sentences = wide.locator("#verdicts .sentence").all_inner_texts()
    assert sentences[:5] == [
        "rti scores as well as ddpm on PushT (within 0.03): shown after 240 seeds.",
        "ddim scores as well as ddpm on PushT (within 0.03): shown after 240 seeds.",
        "paraddpm scores at least as well as ddpm on PushT, to within 0.03: shown after 240 seeds.",
        "Not decided: whether dpm2m scores as well as ddpm on PushT (within 0.03). 240 seeds so far.",
        "rti 300 ms succeeds less often than rti on PushT by more than 10 percentage points: "
        "shown after 240 seeds.",
    ]
    text = wide.locator("#verdicts").inner_text()
    assert "172 seeds saved: a test of a size fixed in advance would have needed 412." in text
    assert "About 640 more seeds would decide" in text
    assert "\u22120.004 [\u22120.025, +0.017]" in text


def test_headings_are_nested_and_what_can_be_used_has_a_name(wide):
    levels = wide.eval_on_selector_all("body :is(h1,h2,h3)", "all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= level + 1 for level, later in pairwise(levels))
    nameless = wide.eval_on_selector_all(
        "button, a, select, input, svg[role=img], [role=grid], [role=gridcell], [role=region]",
        """all => all.filter(e => !(e.getAttribute("aria-label") || e.textContent.trim()
            || e.closest("label"))).map(e => e.outerHTML)""",
    )
    assert nameless == []


@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_the_page_doesnt_scroll_sideways(width, request):
    shown = request.getfixturevalue(width)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    overflowing = """all => all.filter(svg => svg.getBBox().x < -1
        || svg.getBBox().x + svg.getBBox().width > svg.width.baseVal.value + 2).length"""
    assert shown.eval_on_selector_all(".plot > svg", overflowing) == 0


@pytest.mark.parametrize("scheme", ["wide", "narrow"])
def test_contrast_is_aa(scheme, request):
    """In light, and in dark."""
    found = request.getfixturevalue(scheme).evaluate(CONTRAST)
    assert len(found) > 30
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_the_grid_is_sorted_and_filtered(wide):
    def seeds():
        rows = "rows => rows.sort((a, b) => a.dataset.row - b.dataset.row).map(r => r.firstChild.textContent)"
        return [int(seed) for seed in wide.eval_on_selector_all("#panel-0 .gridRow", rows)]

    def expected(key):
        return sorted(range(240), key=key)[:12]

    episodes = {
        name: arm["episodes"] for name, arm in sample_report()["arms"].items() if arm["task"] == "pusht"
    }
    success = np.array([each["success"] for each in episodes.values()])
    mixed = success.any(0) & ~success.all(0)
    rti = np.round(episodes["pusht/rti"]["score"], 4)
    assert seeds()[:12] == list(range(500000, 500012))
    wide.get_by_role("columnheader", name=re.compile(r"^rti \d+ %")).get_by_role("button").click()
    assert seeds()[:12] == [500000 + k for k in expected(lambda k: (-rti[k], k))]
    wide.locator("#panel-0 select").select_option("disagreement")
    spread = np.ptp([np.round(each["score"], 4) for each in episodes.values()], axis=0)
    assert seeds()[:12] == [500000 + k for k in expected(lambda k: (~mixed[k], -spread[k], k))]
    wide.locator("#panel-0 select").select_option("seed")
    wide.get_by_label("Only where samplers disagree").first.check()
    assert seeds()[:5] == (500000 + np.flatnonzero(mixed))[:5].tolist()
    assert wide.locator("#panel-0 .count").inner_text().startswith(f"{mixed.sum()} seeds shown")
    wide.get_by_label("Only where samplers disagree").first.uncheck()


def test_what_falls_short_of_one_is_not_shown_as_one(wide):
    shown = [wide.evaluate(f"scoreText({score})") for score in (0.9967, 1, 0.29, -0.5, "null")]
    assert shown == ["0.99", "1.00", "0.29", "\u22120.50", "\u2013"]


def test_the_keyboard_opens_and_closes_a_video(wide):
    wide.locator("#panel-0 input[type=checkbox]").focus()
    wide.keyboard.press("Tab")  # the grid's box scrolls, so it may have a stop of its own
    for _ in range(12):
        if wide.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
            break
        wide.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    wide.keyboard.press("Control+Home")
    assert wide.evaluate(focused).startswith("seed 500000, ddpm: ")
    for key in ("ArrowDown",) * 3 + ("ArrowRight",) * 4:
        wide.keyboard.press(key)
    assert re.fullmatch(r"seed 500003, rti: .+, video", wide.evaluate(focused))
    assert wide.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    wide.keyboard.press("Enter")
    assert wide.locator("#episode-title").inner_text() == "PushT \u00b7 rti, seed 500003"
    assert wide.evaluate(PLAYABLE)
    wide.keyboard.press("Escape")
    assert not wide.locator("dialog").is_visible()
    assert wide.evaluate(focused).startswith("seed 500003, rti: ")
    wide.keyboard.press("End")
    wide.keyboard.press("Enter")
    assert wide.locator("dialog code").inner_text() == sample_report()["videos"]["command"]
    wide.keyboard.press("Escape")


def test_a_video_that_is_missing_shows_its_command(narrow):
    narrow.locator("[aria-label^='seed 500003, ddpm:']").click()
    narrow.locator("dialog code").wait_for()
    assert "isn\u2019t beside this page" in narrow.locator("dialog").inner_text()
    narrow.locator("dialog").get_by_role("button", name="Close").click()


def test_figures_are_downloaded(wide):
    figures = wide.locator("figure")
    assert figures.count() == 6
    for k in range(figures.count()):
        drawing = figures.nth(k).locator(".plot > svg")
        size = [32 + int(drawing.get_attribute(side)) for side in ("width", "height")]
        with wide.expect_download() as download:
            figures.nth(k).locator("[data-save=svg]").click()
        text = download.value.path().read_text()
        root = ElementTree.fromstring(text)
        assert [int(root.get(side)) for side in ("width", "height")] == size
        assert "class=" not in text and "var(--" not in text
        if k < 2:
            with wide.expect_download() as download:
                figures.nth(k).locator("[data-save=png]").click()
            picture = Image.open(io.BytesIO(download.value.path().read_bytes()))
            assert download.value.suggested_filename.endswith(".png")
            assert list(picture.size) == [2 * side for side in size]
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_thousand_seeds_of_fifteen_arms_are_shown_fast(browser, tmp_path):
    rng, report = np.random.default_rng(0), sample_report(n=1000, tasks=("pusht",))
    hardness = rng.normal(size=1000)
    for k in range(15 - len(report["arms"])):
        report["arms"][f"pusht/rti {k}"] = sample_arm(rng, "pusht", "rti", hardness)
    path = write_page(report, tmp_path / "report.html")
    assert path.stat().st_size < study_page.LARGEST_PAGE
    shown, seen = opened(browser, path, 1280)
    assert 0 < seconds_of_page(seen) < 1
    assert shown.locator(".cell").count() < 700
    shown.locator("[data-row='0'][data-column='0']").focus()
    shown.keyboard.press("Control+End")
    assert shown.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "seed 500999, rti 8:"
    )
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert seen.errors == []


def test_names_are_only_text(browser, tmp_path):
    """Also one that would end the script that holds it, and figures that aren't known."""
    evil = "</script><b>{{page.js}}<!--"
    report = json.loads(json.dumps(sample_report(n=3)).replace("pusht/rti 300 ms", evil))
    report |= {"title": evil, "name": evil, "unfinished": [evil]}
    question = report["questions"][0]
    question |= {"n": 0, "mean": float("nan"), "interval": [None, None], "claim": None, "decided": False}
    question |= {"seeds_needed": None, "stopped": "unfinished"}
    arm = report["arms"]["pusht/ddpm"]
    arm["score"] = {"n": 0, "mean": None, "standard_error": None}
    arm["episodes"] = {"seed": [], "score": [], "success": [], "n_steps": []}
    arm |= {"success": None, "plan_latency_ms": None, "timeline": None, "smoothness": None}
    arm |= {name: {"values": [], "counts": []} for name in ("iterations", "nfe")}
    shown, seen = opened(browser, write_page(report, tmp_path / "report.html"), 1280)
    assert seen.errors == []
    assert shown.title() == evil and shown.locator("h1").inner_text() == evil
    assert shown.locator(".verdict b").count() == len(
        report["questions"]
    )  # the mean differences, nothing else
    assert evil in shown.locator("#verdicts").inner_text()
    assert shown.locator("figure").count() == 6


# ------------------------------------------------------------------------------------------ what is written


def stored(path):
    text = path.read_text()
    return json.loads(text.split('<script type="application/json" id="report">')[1].split("</script>")[0])


def test_the_file_needs_nothing_else(tmp_path):
    text = write_page(sample_report(), tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\((?!data:)""", text)
    assert "{{" not in text.split('id="report">')[0]
    assert "default-src 'none'" in text


def test_every_part_is_used():
    names = {path.name for path in (ROOT / "paradiffpolicy" / "study" / "page").iterdir()}
    assert names == {*PARTS, "page.html"}


def test_small_videos_are_put_in_seed_by_seed(folder, tmp_path, monkeypatch):
    page = stored(write_page(sample_report(), tmp_path / "report.html", videos_from=folder))
    assert list(page["videos"]["embedded"]) == ["pusht/rti"]
    assert page["videos"]["embedded"]["pusht/rti"]["500003"].startswith("data:video/mp4;base64,")
    monkeypatch.setattr(study_page, "LARGEST_PAGE", 1000)
    page = stored(write_page(sample_report(), tmp_path / "report.html", videos_from=folder))
    assert page["videos"]["embedded"] == {}


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=300), st.integers(2, 50))
def test_long_lists_are_thinned_and_keep_their_ends(values, most):
    thin = spread_thin(values, most)
    assert len(thin) == min(most, len(values))
    assert min(thin) == pytest.approx(min(values), abs=1e-4)
    assert max(thin) == pytest.approx(max(values), abs=1e-4)
    worst, every = worst_of_groups(values, most)
    assert len(worst) <= most and max(worst) == max(values)
    assert len(worst) == -(-len(values) // every)


def bad(change):
    report = copy.deepcopy(sample_report(n=3))
    change(report)
    return report


BAD = {
    "format=2": lambda r: r.update(format=2),
    "no arms": lambda r: r.update(arms={}),
    "no name": lambda r: r.pop("name"),
    "list of questions": lambda r: r.update(questions=None),
    "arm 'pusht/ddim'.*episodes": lambda r: r["arms"]["pusht/ddim"].pop("episodes"),
    "different lengths": lambda r: r["arms"]["pusht/ddim"]["episodes"]["seed"].pop(),
    "score=": lambda r: r["arms"]["pusht/ddim"]["episodes"].update(score=["a", "b", "c"]),
    "lacks counts": lambda r: r["arms"]["lift/rti"]["nfe"]["counts"].append(1),
    "p50=None": lambda r: r["arms"]["lift/rti"]["plan_latency_ms"].pop("p50"),
    "lateness_ms=": lambda r: r["arms"]["lift/rti"]["timeline"].update(lateness_ms=[None]),
    "question 1: reference='pusht/x'": lambda r: r["questions"][0].update(reference="pusht/x"),
    "measure='speed'": lambda r: r["questions"][0].update(measure="speed"),
    "two numbers": lambda r: r["questions"][0].update(interval=[0.1]),
    "aren't by arm": lambda r: r["videos"].update(files=["a.mp4"]),
    "isn't a relative path": lambda r: r["videos"]["files"]["pusht/rti"].update({"1": "https://x/a.mp4"}),
    "seed 2, isn't a relative": lambda r: r["videos"]["files"]["pusht/rti"].update({"2": "../../a.mp4"}),
    "seed 3, isn't a relative": lambda r: r["videos"]["files"]["pusht/rti"].update({"3": "/etc/passwd"}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_report_is_refused_in_one_line(message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        write_page(bad(BAD[message]), tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_leads_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "pusht_rti_500003.mp4").symlink_to(folder / "videos" / "pusht_rti_500003.mp4")
    with pytest.raises(InputError, match="leads out of"):
        write_page(sample_report(), tmp_path / "report.html", videos_from=tmp_path)

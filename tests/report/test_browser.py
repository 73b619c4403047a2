"""The page of a run in a real browser: Debian's Chromium, driven by Playwright."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from flowgrpo_jax.report.page import render_page, write_report
from flowgrpo_jax.report.serve import Server
from flowgrpo_jax.runtime import samples
from flowgrpo_jax.runtime.samples import Sample

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium on the PATH")

_LONG = 10_000
_WIDTHS = (390, 820, 1280)
# Elements whose text is wider than they are, or that reach beyond the page. What scrolls
# on purpose is left out.
_CUT_OFF = """() => [...document.querySelectorAll("main *")].filter((one) => {
  if (one.closest(".table, .plot, svg, template, select") || !one.offsetWidth) return false;
  return one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline"
    || one.getBoundingClientRect().right > innerWidth + 1;
}).map((one) => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Ten thousand iterations with forty metrics, and pictures from ten evaluations."""
    workdir = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    config = {"reward": {"mine": 1.0}, "num_iterations": _LONG, "recipe": "flow_grpo"}
    (workdir / "config.json").write_text(json.dumps(config))
    lines = []
    for i in range(_LONG):
        noise = rng.normal(size=40).tolist()
        row = {"iteration": i, "kind": "train", "reward_avg": i / _LONG + noise[0]}
        row |= {f"metric_{n}": value for n, value in enumerate(noise[3:])}
        row |= {"clipfrac": 0.1, "decoded_images": 64, "time/wall": 3.6 * (i + 1)}
        if i % 250 == 0:
            scores = {"eval_reward_mine": i / _LONG, "eval_reward_avg": i / _LONG}
            scores |= {"eval_diversity": 0.3, "time/wall": 3.6 * i}
            lines.append(json.dumps({"iteration": i, "kind": "eval"} | scores))
        lines.append(json.dumps(row))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    folder = workdir / "samples"
    folder.mkdir()
    prompts = ["a photo of a dog", "word " * 40, "x" * 200]
    for i in range(0, _LONG, 1000):
        noise = rng.random((12, 256, 256, 3), np.float32)
        shown = [
            Sample(image, prompts[n % 3], {"mine": i + n / 100})
            for n, image in enumerate(noise)
        ]
        samples.save(folder, samples.name_of(i), shown)
    samples.save(folder, samples.GROUPS, shown[:4], iteration=_LONG - 1)
    # As a user does it: annotations are not checked there, which takes long.
    command = [sys.executable, "-m", "flowgrpo_jax.report", f"--workdir={workdir}"]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    assert told.stdout.split() == [str(workdir / "report.html")]
    return workdir


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": _CHROMIUM, "args": ["--no-sandbox"]}
        yield playwright.chromium.launch(**options)


@pytest.fixture
def opened(browser):
    """Opens an address; what the browser complains of makes the test fail."""
    complaints, contexts = [], []

    def open_page(address, width=1280, scheme="light"):
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(address)
        page.wait_for_selector("body[data-ready]", timeout=20_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def chart(page, title):
    return page.locator("#curves figure", has=page.locator(f"h4:text-is('{title}')"))


def test_a_long_run_opens_at_every_width(long_run, opened):
    """Oracle: no text is cut off, every chart has drawn its two axes, 5 MB."""
    path = long_run / "report.html"
    assert path.stat().st_size < 5_000_000
    for width in _WIDTHS:
        for scheme in ("light", "dark"):
            page = opened(path.as_uri(), width, scheme)
            assert page.evaluate(_CUT_OFF) == []
            assert page.evaluate("document.documentElement.scrollWidth") == width
            plots = page.locator("#curves section .plot")
            assert plots.count() > 40
            assert page.locator("#curves section canvas").count() == plots.count()
            drawn = page.locator("#curves section .plot").first
            colours = drawn.locator("canvas").evaluate(
                "c => new Set(new Uint32Array(c.getContext('2d')"
                ".getImageData(0, 0, c.width, c.height).data.buffer)).size"
            )
            assert colours > 10


def test_values_are_under_the_pointer(long_run, opened):
    """Oracle: the rows; at the right end the mean of the last 25 is told."""
    page = opened((long_run / "report.html").as_uri())
    figure = chart(page, "Training reward")
    before = figure.locator(".legend").inner_text()
    over = figure.locator(".u-over")
    box = over.bounding_box()
    over.hover(position={"x": box["width"] - 1, "y": 50})
    told = figure.locator(".legend").inner_text()
    assert told != before and told.endswith("at 9,987") and " to " in told


def test_axes_smoothing_and_folded_charts(long_run, opened):
    """Oracle: by hand; an axis is kept when the page is loaded again."""
    page = opened((long_run / "report.html").as_uri())
    figure = chart(page, "Training reward")
    rough = figure.locator(".legend").inner_text()
    page.locator("#smooth").fill("20")
    assert figure.locator(".legend").inner_text() != rough
    over = figure.locator(".u-over")
    for axis, last in (("hours", "at 9.99"), ("images", "at 639,168")):
        page.select_option("#axis", axis)
        box = over.bounding_box()
        over.hover(position={"x": box["width"] - 1, "y": 50})
        assert figure.locator(".legend").inner_text().endswith(last)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#axis").input_value() == "images"
    folded = page.locator("#curves details").first
    assert folded.locator("canvas").count() == 0
    folded.locator("summary").click()
    folded.locator("canvas").first.wait_for()


def test_the_slider_goes_through_training(long_run, opened):
    """Oracle: the captions of the samples; the left side stays."""
    page = opened((long_run / "report.html").as_uri())
    first = page.locator(".through .twin").first
    assert first.locator("figcaption").all_inner_texts() == ["mine: 0", "mine: 9e+03"]
    later = first.locator(".now img").get_attribute("src")
    page.locator(".through input").fill("4")
    assert page.locator(".through output").inner_text() == "iteration 4,000"
    assert first.locator("figcaption").all_inner_texts() == ["mine: 0", "mine: 4e+03"]
    assert first.locator(".now img").get_attribute("src") != later


def test_a_run_with_one_evaluation(tmp_path, opened):
    """Oracle: by hand: its pictures are there, and no slider."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    image = np.zeros((8, 8, 3), np.float32)
    samples.save(tmp_path / "samples", samples.name_of(0), [Sample(image, "a dog", {})])
    page = opened(write_report(tmp_path).as_uri())
    assert page.locator(".twin img").count() == 1
    assert page.locator(".through input").count() == 0


def test_a_served_page_follows_its_run(long_run, opened, tmp_path):
    """Oracle: a row that is written while the page is open; strangers are refused."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(long_run / name, tmp_path / name)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows[:50]) + "\n")
    with Server([tmp_path], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = opened(server.url)
        assert "49 of 10,000 iterations" in page.inner_text("header")
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows[:80]) + "\n")
        page.locator("header:has-text('79 of 10,000')").wait_for(timeout=20_000)
        server.shutdown()


def test_markup_in_names_is_text(tmp_path, opened):
    """Oracle: no element comes of a name, in a chart, a caption or a run's folder."""
    mark = "<b>x</b><img src=x onerror=alert(1)>"
    workdir = tmp_path / "<i>run<"
    (workdir / "samples").mkdir(parents=True)
    config = {"reward": {mark: 1.0}, "recipe": mark}
    (workdir / "config.json").write_text(json.dumps(config))
    row = {f"reward_{mark}": 1.0, mark: 2.0}
    rows = [{"iteration": i, "kind": "train"} | row for i in (0, 1)]
    rows.insert(1, {"iteration": 0, "kind": "eval", f"eval_reward_{mark}": 1.0})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines)
    image = np.zeros((8, 8, 3), np.float32)
    for i in (0, 1):
        shown = [Sample(image, mark, {mark: 0.5})]
        samples.save(workdir / "samples", samples.name_of(i), shown)
    path = tmp_path / "page.html"
    path.write_text(render_page([workdir], tmp_path))
    page = opened(path.as_uri())
    assert page.locator("b:text-is('x'), i:text-is('run'), img[src=x]").count() == 0
    assert mark in page.inner_text(".twin .prompt")
    assert mark in page.inner_text("#curves")

"""report.html: what of a workdir is on the page."""

import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report.page import write_report
from flowgrpo_jax.runtime.images import save_grid
from flowgrpo_jax.runtime.metrics import MetricWriter

TASKS = ("single_object", "counting", "overall")
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps text, addresses and tag names."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.tags, self.links, self.words = [], set(), [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data.strip())


def make_run(workdir) -> None:
    """Twenty iterations with an evaluation at 0, 10 and 20."""
    rng = np.random.default_rng(0)
    (workdir / "config.json").write_text(
        json.dumps({"seed": 7, "recipe": "flow_grpo", "train": {"beta": 0.04}})
    )
    with MetricWriter(workdir, 0, tensorboard=False) as writer:
        for i in range(21):
            if i % 10 == 0:
                scores = {f"eval_{t}_accuracy": 0.5 + i / 50 for t in TASKS}
                scores |= {f"eval_unguided_{t}_accuracy": 0.25 + i / 50 for t in TASKS}
                scores["eval_diversity"] = 0.3
                writer.write(i, scores, kind="eval")
            reward = {"reward_avg": 0.5 + i / 100 + rng.normal() / 100}
            speed = {"time/images_per_second": 100.0 + i, "time/update": 0.5}
            writer.write(
                i, {**reward, "kl_loss": 1e-4 * i, "my_metric": float(i), **speed}
            )


def read(path) -> tuple[str, Page, str]:
    text = path.read_text()
    page = Page(text)
    return text, page, " ".join(word for word in page.words if word)


def test_scores_curves_and_config_are_on_the_page(tmp_path):
    """Oracle: the metrics written, as they should read; 50% -> 90% guided."""
    make_run(tmp_path)
    _, page, words = read(write_report(tmp_path))
    assert "Score with guidance 50.0% → 90.0% +40.0 points" in words
    assert "Score without guidance 25.0% → 65.0% +40.0 points" in words
    row = "counting 50.0% 90.0% +40.0 25.0% 65.0% +40.0"
    assert row in words
    assert words.index("single object 50.0%") < words.index("overall 50.0%")
    names = ("Reward", "KL to the reference", "Diversity", "my_metric")
    for title in names:
        assert title in page.words
    assert "time/update" not in page.words
    assert "train.beta" in words and "0.04" in words
    assert "seed 7" in words and "21 iterations" in words


def test_throughput_and_ratios_are_among_the_curves(tmp_path):
    """Oracle: the titles, by hand; metrics without a title of their own come last."""
    make_run(tmp_path)
    with MetricWriter(tmp_path, 21, tensorboard=False) as writer:
        for i in (21, 22):
            ratios = {"ratio": 1.0, "ratio_std": 0.01 * i, "ratio_gap": 0.0}
            writer.write(i, {**ratios, "time/images_per_second": 100.0})
    _, _, words = read(write_report(tmp_path))
    curves, others = words.split("All other metrics")
    assert "Throughput images per second of training time/images_per_second" in curves
    assert "Probability ratio" in curves
    assert "ratio_std" in others and "ratio_gap" in others


def test_every_way_to_make_images_has_its_line(tmp_path):
    """Oracle: the texts, by hand: a chart a metric, a line a column."""
    (tmp_path / "config.json").write_text("{}")
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        for i in (0, 4):
            rewards = {f"eval{c}_reward_avg": 0.5 for c in ("", "_unguided", "_sde")}
            writer.write(i, rewards | {"eval_sde_gap": 0.1}, kind="eval")
    _, _, words = read(write_report(tmp_path))
    change = r"\S+ → \S+"
    legend = f"with guidance {change} without {change} sampler of training {change}"
    assert re.search(f"Reward avg {legend}", words)
    assert "Gain of the sampler of training its reward less that of the ODE" in words
    assert words.count("Reward avg") == 1


def test_no_template_lets_markup_through():
    """Oracle: what templates may say; they are filled with autoescape and no exception."""
    templates = resources.files("flowgrpo_jax.report").joinpath("templates")
    texts = {file.name: file.read_text() for file in templates.iterdir()}
    assert {"base.html.j2", "report.html.j2", "compare.html.j2"} <= texts.keys()
    for name, text in texts.items():
        assert not re.search(r"\|\s*safe|autoescape|<script", text), name


def test_the_page_needs_nothing_else(tmp_path):
    """Oracle: no address but data URLs, no script, tags that close in order."""
    make_run(tmp_path)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).random((4, 400, 400, 3), np.float32)
    for i in range(0, 21, 2):
        images = noise if i == 0 else np.zeros((4, 8, 8, 3), np.float32)
        save_grid(tmp_path / "samples" / f"iteration_{i:06d}.png", images, 2)
    text, page, _ = read(write_report(tmp_path))
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert len(page.links) == 8
    assert all(link.startswith("data:image/") for link in page.links)
    assert page.links[0].startswith("data:image/jpeg"), "a large one is made smaller"
    shown = [int(n) for n in re.findall(r"samples at iteration (\d+)", text)]
    assert shown[:2] == [0, 20] and len(set(shown)) == 8
    assert len(text) < 1_500_000


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_sample_grids(tmp_path, count):
    """Oracle: each grid is shown once."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    for i in range(count):
        path = tmp_path / "samples" / f"iteration_{i:06d}.png"
        Image.new("RGB", (4, 4)).save(path)
    _, page, _ = read(write_report(tmp_path))
    assert len(page.links) == count


def test_extra_facts_and_their_escaping(tmp_path):
    """Oracle: the texts of report.json, as a reader sees them."""
    make_run(tmp_path)
    extra = {
        "title": "A <run>",
        "command": "python -m flowgrpo_jax.main --config.x='<a>'",
        "facts": {"Images": "57,600 & more"},
        "notes": ["seed 2 & 3"],
        "tables": [{"title": "Peers", "columns": ["a", "b"], "rows": [["x", 1]]}],
    }
    (tmp_path / "report.json").write_text(json.dumps(extra))
    _, page, words = read(write_report(tmp_path))
    for text in (extra["title"], extra["command"], "57,600 & more", "seed 2 & 3"):
        assert text in page.words
    assert "Peers a b x 1" in words
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="report.json: not JSON"):
        write_report(tmp_path)


def test_an_empty_run_still_has_a_page(tmp_path):
    """Oracle: the rule; only config.json is needed."""
    with pytest.raises(UserError, match="holds no config.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1}')
    _, _, words = read(write_report(tmp_path))
    assert "Scores by task" not in words
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.write(0, {"eval_overall_accuracy": 0.625}, kind="eval")
        writer.write(0, {"reward_avg": float("nan")})
    _, _, words = read(write_report(tmp_path))
    assert "62.5%" in words

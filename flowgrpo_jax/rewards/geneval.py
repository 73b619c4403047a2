"""GenEval's scores from detections: official accuracy and Flow-GRPO's reward.

Any vocabulary will do: the record of a prompt says what was requested, the detections
say what is in the image (arXiv 2310.11513; arXiv 2505.05470, appendix).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError
from flowgrpo_jax.rewards import geneval_records
from flowgrpo_jax.rewards.detection import ColorNamer, Detection, Detector, Images
from flowgrpo_jax.rewards.registry import Context

Record = Mapping[str, Any]
Objects = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True)
class Rules:
    """The benchmark's constants: which detections count, and when A is left of B.

    A detection counts above `threshold` (`counting_threshold` for counting prompts).
    `position` is the share of both objects' sizes that their offset must exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position: float = 0.1


BENCHMARK = Rules()


def detected(
    record: Record, detections: Sequence[Detection], rules: Rules = BENCHMARK
) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first."""
    counting = record["tag"] == "counting"
    threshold = rules.counting_threshold if counting else rules.threshold
    objects: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.score):
        same_class = objects.setdefault(one.class_name, [])
        if one.score > threshold and len(same_class) < rules.max_objects:
            same_class.append(one)
    return objects


def relations(a: Detection, b: Detection, rules: Rules = BENCHMARK) -> set[str]:
    """Where `a` is with respect to `b`: no relation, one or two."""
    corners = np.array([a.box, b.box], dtype=np.float64).reshape(2, 2, 2)
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    beyond = np.maximum(np.abs(offset) - rules.position * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {
        "left of": dx < -0.5,
        "right of": dx > 0.5,
        "above": dy < -0.5,
        "below": dy > 0.5,
    }
    return {relation for relation, true in holds.items() if true}


def official_score(
    record: Record, detections: Sequence[Detection], rules: Rules = BENCHMARK
) -> float:
    """1 if the image passes the benchmark's check, else 0.

    A clause looks at the `count` most confident objects of its class. More of them make
    an image fail only where the record excludes that (counting).
    """
    objects = detected(record, detections, rules)
    groups: list[Sequence[Detection] | None] = []
    for clause in record["include"]:
        group = objects.get(clause["class"], [])[: clause["count"]]
        matched = (
            len(group) == clause["count"]
            and _color_count(clause, group) == clause["count"]
            and _in_position(clause, group, groups, rules)
        )
        groups.append(group if matched else None)
    excluded = any(
        len(objects.get(clause["class"], [])) >= clause["count"]
        for clause in record.get("exclude", [])
    )
    return float(None not in groups and not excluded)


def continuous_score(
    record: Record,
    detections: Sequence[Detection],
    failed_position_scores: bool = False,
    rules: Rules = BENCHMARK,
) -> tuple[float, float]:
    """(score, strict): Flow-GRPO's graded reward, and 1 if every clause is right.

    Each clause gives a mark for its count, 1 - |wanted - detected| / wanted over all
    detected objects (so it can be negative), and one for its colour and position; the
    score is the mean mark. `failed_position_scores` reproduces the reference server,
    which gives a failed position the marks 0 *and* 1: .75 in place of .667.
    """
    objects = detected(record, detections, rules)
    groups: list[Sequence[Detection] | None] = []
    marks: list[float] = []
    for clause in record["include"]:
        group, wanted = objects.get(clause["class"], []), clause["count"]
        marks.append(1 - abs(wanted - len(group)) / wanted)
        matched = len(group) == wanted
        if not matched and ("color" in clause or "position" in clause):
            marks.append(0.0)
        if matched and "color" in clause:
            colored = _color_count(clause, group)
            marks.append(1 - abs(wanted - colored) / wanted)
            matched = colored == wanted
        if matched and "position" in clause:
            matched = _in_position(clause, group, groups, rules)
            marks.append(float(matched))
            has_target = groups[clause["position"][1]] is not None
            if failed_position_scores and has_target and not matched:
                marks.append(1.0)
        groups.append(group if matched else None)
    return sum(marks) / len(marks), float(None not in groups)


def by_task(
    prompts: Sequence[Prompt], values: Float[np.ndarray, " sample"]
) -> dict[str, float]:
    """The mean value of each task; prompts without a task are left out."""
    tags = [prompt.metadata.get("tag") for prompt in prompts]
    tasks = [tag for tag in dict.fromkeys(tags) if tag is not None]
    names = np.array(tags)
    return {str(tag): float(values[names == tag].mean()) for tag in tasks}


def overall(accuracy: Mapping[str, float]) -> float:
    """GenEval's overall score: the unweighted mean over the tasks."""
    return sum(accuracy.values()) / len(accuracy)


def make(
    context: Context,
    detector: str | None = None,
    colors: str | None = None,
    dtype: str = "float32",
    microbatch: int = 4,
    **options: Any,
) -> "GenEval":
    """The reward with the context's detector, or with Mask2Former and CLIP.

    `detector` and `colors` are folders or hub ids of their weights, by default the
    benchmark's; naming one of them turns on both networks. They compute in `dtype`, on
    `microbatch` images per device at a time. `options` are those of `GenEval`.
    """
    if context.detector is not None and detector is None and colors is None:
        return GenEval(context.detector, **options)
    # Imported only here: the networks take minutes to load and need transformers.
    from flowgrpo_jax.rewards import clip_model
    from flowgrpo_jax.rewards.colors import ClipColors
    from flowgrpo_jax.rewards.mask2former import COCO_SWIN_S, Mask2FormerDetector

    clip_model.check_dtype("reward_options.geneval", dtype)
    finds = Mask2FormerDetector(detector or COCO_SWIN_S, jnp.dtype(dtype), microbatch)
    names = ClipColors(colors or clip_model.CLIP_L, dtype)
    return GenEval(finds, **options, colors=names)


class GenEval:
    """The reward "geneval": the continuous score, with its accuracies beside it.

    `extra_object_penalty` p divides a positive score by 1 + p * (objects beyond the
    number requested); without it, extra objects are free outside counting and a
    policy learns to fill the image. A detector that names no colours needs `colors`,
    which names those of the objects whose colour changes a score.
    """

    def __init__(
        self,
        detector: Detector,
        extra_object_penalty: float = 0.0,
        failed_position_scores: bool = False,
        rules: Rules = BENCHMARK,
        colors: ColorNamer | None = None,
    ):
        if extra_object_penalty < 0:
            raise UserError(
                f"reward: geneval: extra_object_penalty {extra_object_penalty}:"
                " must not be negative"
            )
        self.detector = detector
        self.extra_object_penalty = extra_object_penalty
        self.failed_position_scores = failed_position_scores
        self.rules = rules
        self.colors = colors

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, Float[np.ndarray, " image"]]:
        """Scores each image against its prompt.

        "geneval" is the continuous score, "accuracy" the official one, and
        "strict_accuracy" 1 if every clause is right; "objects" is how many there are,
        and "exact_count" 1 if that is the number requested. UserError for a prompt
        whose record cannot be scored.
        """
        for prompt in prompts:
            try:
                self.check_prompt(prompt)
            except ValueError as error:
                raise UserError(
                    f"reward: geneval: prompt {prompt.text!r} {error}"
                ) from error
        per_image = self.detector(images)
        if self.colors is not None:
            per_image = self._colored(self.colors, images, prompts, per_image)
        rows = [
            self._score(prompt.metadata, detections)
            for prompt, detections in zip(prompts, per_image, strict=True)
        ]
        return {
            name: np.array([row[name] for row in rows], dtype=np.float32)
            for name in rows[0]
        }

    def check_prompt(self, prompt: Prompt) -> None:
        """ValueError for a prompt whose record cannot be scored."""
        colors = self.detector if self.colors is None else self.colors
        geneval_records.check(
            prompt.metadata,
            getattr(self.detector, "classes", None),
            getattr(colors, "color_names", None),
        )

    def _colored(
        self,
        name_colors: ColorNamer,
        images: Images,
        prompts: Sequence[Prompt],
        per_image: Sequence[Sequence[Detection]],
    ) -> list[list[Detection]]:
        """The detections, with the colours that a score depends on."""
        wanted = [
            (image, one)
            for image, prompt in enumerate(prompts)
            for one in _color_matters(prompt.metadata, per_image[image], self.rules)
        ]
        names = name_colors(images, wanted)
        named = {id(one): name for (_, one), name in zip(wanted, names, strict=True)}
        return [
            [
                replace(one, color=named[id(one)]) if id(one) in named else one
                for one in detections
            ]
            for detections in per_image
        ]

    def _score(
        self, record: Record, detections: Sequence[Detection]
    ) -> dict[str, float]:
        score, strict = continuous_score(
            record, detections, self.failed_position_scores, self.rules
        )
        objects = sum(map(len, detected(record, detections, self.rules).values()))
        requested = sum(clause["count"] for clause in record["include"])
        if score > 0:
            score /= 1 + self.extra_object_penalty * max(objects - requested, 0)
        return {
            "geneval": score,
            "accuracy": official_score(record, detections, self.rules),
            "strict_accuracy": strict,
            "objects": float(objects),
            "exact_count": float(objects == requested),
        }


def _color_matters(
    record: Record, detections: Sequence[Detection], rules: Rules
) -> list[Detection]:
    """The objects whose colour a clause of the record is about."""
    objects = detected(record, detections, rules)
    return [
        one
        for clause in record["include"]
        if "color" in clause
        and len(objects.get(clause["class"], [])) >= clause["count"]
        for one in objects[clause["class"]][: clause["count"]]
    ]


def _color_count(clause: Mapping[str, Any], group: Sequence[Detection]) -> int:
    """How many of the group have the clause's colour (all, if it asks for none)."""
    if "color" not in clause:
        return len(group)
    return sum(one.color == clause["color"] for one in group)


def _in_position(
    clause: Mapping[str, Any],
    group: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> bool:
    """Whether every object of the group has the relation to every one of its target."""
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    targets = groups[target]
    return targets is not None and all(
        relation in relations(one, other, rules) for one in group for other in targets
    )

"""GenEval's grammar: the contents of a prompt, its wording and its record.

As in the benchmark (arXiv 2310.11513) there are six tasks with one template each, and
articles and plurals follow simple rules: it writes "two toothbrushs", and so do we.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowgrpo_jax.errors import UserError, not_one_of

TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
RELATIONS = ("left of", "right of", "above", "below")
_OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
COUNTS = (2, 3, 4)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

# COCO's classes in COCO's order, with GenEval's names for mouse, remote, keyboard.
COCO80 = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|
    fire hydrant|stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|
    bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|
    sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|
    bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|
    carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|
    tv|laptop|computer mouse|tv remote|computer keyboard|cell phone|microwave|oven|
    toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|
    toothbrush""".replace("\n    ", "").split("|")
)
COLORS10 = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)


@dataclass(frozen=True)
class Vocabulary:
    """The classes and colours of prompts; classes in `colorless` never get a colour."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    colorless: tuple[str, ...] = ("person",)

    def __post_init__(self) -> None:
        for key, words in (("classes", self.colored), ("colors", self.colors)):
            if len(words) < 2 or len(set(words)) < len(words):
                raise UserError(
                    f"vocabulary.{key}: {words}: at least 2, all different"
                    " (classes: without the colorless ones)"
                )

    @property
    def colored(self) -> tuple[str, ...]:
        """The classes that a prompt may name with a colour."""
        return tuple(name for name in self.classes if name not in self.colorless)


COCO = Vocabulary(COCO80, COLORS10)


class Item(NamedTuple):
    """Some objects of one class that a prompt asks for."""

    name: str
    number: int = 1
    color: str | None = None


class Request(NamedTuple):
    """Everything that a prompt asks for, in the order of its text."""

    tag: str
    items: tuple[Item, ...]
    relation: str | None = None


def enumerate_requests(vocabulary: Vocabulary, tag: str) -> Iterator[Request]:
    """Every request of one task, in a fixed order."""
    pairs = itertools.permutations(vocabulary.classes, 2)
    match tag:
        case "single_object":
            for name in vocabulary.classes:
                yield Request(tag, (Item(name),))
        case "two_object":
            for a, b in pairs:
                yield Request(tag, (Item(a), Item(b)))
        case "counting":
            for name, count in itertools.product(vocabulary.classes, COUNTS):
                yield Request(tag, (Item(name, count),))
        case "colors":
            for name, color in itertools.product(vocabulary.colored, vocabulary.colors):
                yield Request(tag, (Item(name, 1, color),))
        case "position":
            for (a, b), relation in itertools.product(pairs, RELATIONS):
                yield Request(tag, (Item(a), Item(b)), relation)
        case "color_attr":
            colored = itertools.product(vocabulary.colored, vocabulary.colors)
            items = [Item(name, 1, color) for name, color in colored]
            for one, other in itertools.permutations(items, 2):
                if one.name != other.name and one.color != other.color:
                    yield Request(tag, (one, other))
        case _:
            raise not_one_of("task", tag, TASKS)


def reworded(request: Request) -> Request:
    """The same picture, objects in the other order: "B and A", "B right of A"."""
    tag, items, relation = request
    return Request(tag, items[::-1], relation and _OPPOSITE[relation])


def content(request: Request) -> Request:
    """One request for all wordings of a picture: the one that sorts first."""
    return min(request, reworded(request), key=lambda wording: wording.items)


def record(request: Request) -> dict[str, Any]:
    """The benchmark's record: tag, include, exclude (when counting), prompt."""
    clauses = [_clause(item) for item in request.items]
    if request.relation is not None:
        # The benchmark lists the reference object, the text's second noun, first;
        # a position names its reference by its place in the list.
        clauses[0]["position"] = [request.relation, 0]
        clauses.reverse()
    result: dict[str, Any] = {"tag": request.tag, "include": clauses}
    if request.tag == "counting":
        (item,) = request.items
        result["exclude"] = [{"class": item.name, "count": item.number + 1}]
    result["prompt"] = wording(request)
    return result


def wording(request: Request) -> str:
    """The prompt's text, "a photo of ..."."""
    conjunction = f" {request.relation or 'and'} "
    return "a photo of " + conjunction.join(map(_phrase, request.items))


def _clause(item: Item) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": item.name, "count": item.number}
    return clause if item.color is None else {**clause, "color": item.color}


def _phrase(item: Item) -> str:
    if item.number > 1:
        plural = "es" if item.name.endswith("s") else "s"
        return f"{NUMBER_WORDS[item.number]} {item.name}{plural}"
    words = item.name if item.color is None else f"{item.color} {item.name}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

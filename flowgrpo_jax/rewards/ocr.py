"""The reward "ocr": how well the text that a prompt puts in quotes can be read.

The score "edit" is Flow-GRPO's (arXiv 2505.05470): the edit distance between the wanted
text and all text that is read, without case and spaces. It changes by whole letters,
and not at all as long as wrong letters are read. The score "ctc" is how probable the
recogniser holds the wanted text to be: it changes with every pixel of a detected line.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from flowgrpo_jax.data.prompts import Prompt
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards.detection import Images
from flowgrpo_jax.rewards.registry import Context, Reward
from flowgrpo_jax.rewards.text_lines import BLANK, Line, Reader

SCORES = ("edit", "ctc")


class OCR:
    """Scores each image by the text that a reader finds in it.

    Args:
      reader: reads the lines of text in images.
      score: "edit" or "ctc"; see `similarity` and `readability`.
      min_confidence: lines with less confidence are ignored. The reference uses all of
        them and so rewards letters that are hardly visible.
    """

    def __init__(
        self, reader: Reader, score: str = "edit", min_confidence: float = 0.0
    ):
        if score not in SCORES:
            raise not_one_of("reward: ocr", f"score {score}", SCORES)
        self.check_prompt = check_prompt
        if not 0 <= min_confidence <= 1:
            raise UserError(
                f"reward: ocr: min_confidence {min_confidence}: must be in [0, 1]"
            )
        self.reader = reader
        self.score = score
        self.min_confidence = min_confidence

    def __call__(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> dict[str, Float[np.ndarray, " image"]]:
        """ "ocr" is the reward; "ocr_exact" is 1 where exactly the wanted text is read.

        With the score "ctc" the edit score stands beside it as "ocr_edit". UserError
        for a prompt without a quoted text.
        """
        wanted = [target(prompt.text) for prompt in prompts]
        lines_per_image = [
            [line for line in lines if line.confidence >= self.min_confidence]
            for lines in self.reader(images)
        ]
        pairs = list(zip(wanted, lines_per_image, strict=True))
        edit = np.array([similarity(t, _joined(lines)) for t, lines in pairs])
        measured = {"ocr": edit, "ocr_exact": (edit == 1).astype(np.float64)}
        if self.score == "ctc":
            measured["ocr_edit"] = edit
            measured["ocr"] = np.array([readability(t, lines) for t, lines in pairs])
        return measured


def make(
    context: Context,
    score: str = "edit",
    min_confidence: float = 0.0,
    threads: int = 0,
    detect: bool = True,
) -> Reward:
    """The reward with the OCR engine of the extra `ocr`; `threads` 0 is one per core.

    With `detect` False every image is taken to be one line of text and nothing else.
    """
    from flowgrpo_jax.rewards import ocr_engine

    return OCR(ocr_engine.PaddleReader(threads, detect), score, min_confidence)


def check_prompt(prompt: Prompt) -> None:
    """ValueError for a prompt without quoted text; it goes on from "the prompt"."""
    parts = prompt.text.split('"')
    if len(parts) < 3 or not folded(parts[1]):
        raise ValueError(
            "must have the text that is to be drawn in double quotes, as in: a sign "
            'that says "open"'
        )


def target(prompt: str) -> str:
    """The text between the first two double quotes; UserError if there is none."""
    try:
        check_prompt(Prompt(prompt))
    except ValueError as error:
        raise UserError(f"reward: ocr: prompt {prompt!r}: {error}") from error
    return prompt.split('"')[1]


def folded(text: str) -> str:
    """The text without spaces and in lower case: so the score compares texts."""
    return text.replace(" ", "").lower()


def similarity(wanted: str, read: str) -> float:
    """1 - edit distance / length of `wanted`, in [0, 1]; 1 if `read` contains it."""
    wanted, read = folded(wanted), folded(read)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(wanted, read), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, mine in enumerate(a, start=1):
        previous, row = row, [i]
        for j, other in enumerate(b, start=1):
            changed = previous[j - 1] + (mine != other)
            row.append(min(changed, previous[j] + 1, row[-1] + 1))
    return row[-1]


def readability(wanted: str, lines: Sequence[Line], floor: float = -10.0) -> float:
    """How probable the recogniser holds the wanted text to be, mapped to [0, 1].

    It is the log-probability per character, of the best line or of all lines joined:
    `floor` or less (and no line at all) gives 0, certainty gives 1.
    """
    views = [_view(folded(wanted), line) for line in lines]
    if not views:
        return 0.0
    whole = np.concatenate(views)
    labels = np.unique(list(folded(wanted)), return_inverse=True)[1] + 1
    best = max(ctc_log_probability(view, labels) for view in [*views, whole])
    return 1 - max(best / len(labels), floor) / floor


def ctc_log_probability(
    log_probs: Float[np.ndarray, "frame symbol"], labels: Int[np.ndarray, " label"]
) -> float:
    """log p(labels) over all alignments (Graves et al. 2006); symbol 0 is blank."""
    states = np.zeros(2 * len(labels) + 1, int)
    states[1::2] = labels
    # A blank may be skipped only between different labels: equal ones need it.
    may_skip = np.zeros(len(states), bool)
    may_skip[2:] = (states[2:] != 0) & (states[2:] != states[:-2])
    forward = np.full(len(states), -np.inf)
    forward[:2] = log_probs[0, states[:2]]
    for frame in log_probs[1:]:
        one_back = np.concatenate([[-np.inf], forward[:-1]])
        two_back = np.concatenate([[-np.inf, -np.inf], forward[:-2]])
        two_back = np.where(may_skip, two_back, -np.inf)
        stays = np.logaddexp(forward, one_back)
        forward = np.logaddexp(stays, two_back) + frame[states]
    return float(np.logaddexp(forward[-1], forward[-2]))


def _joined(lines: Sequence[Line]) -> str:
    return "".join(line.text for line in lines)


def _view(wanted: str, line: Line) -> Float[np.ndarray, "frame symbol"]:
    """Log-probabilities of blank and of the wanted characters, sorted; case is ignored."""
    columns = _columns(line.symbols)
    names = [BLANK, *sorted(set(wanted))]
    frames = line.probabilities.astype(np.float64)
    mass = [frames[:, columns.get(name, [])].sum(1) for name in names]
    with np.errstate(divide="ignore"):
        return np.log(np.stack(mass, axis=1))


@functools.lru_cache(maxsize=4)
def _columns(symbols: tuple[str, ...]) -> dict[str, list[int]]:
    """Columns of each character in either case; a space counts as a blank."""
    columns: dict[str, list[int]] = {}
    for column, symbol in enumerate(symbols):
        columns.setdefault(folded(symbol), []).append(column)
    return columns

"""What the numbers of a run say, in words, and what to do about it.

A pure function of rows and config: no files, no clock. Every check looks at one thing
and returns a verdict or None; `verdicts` puts them in order, the headline first.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowgrpo_jax.report import hacking
from flowgrpo_jax.report.charts import number
from flowgrpo_jax.runtime import metric_meanings, metric_names

Row = Mapping[str, Any]
Tone = Literal["bad", "good", "warn", "plain"]

RECENT = 50  # training rows that tell how it goes now
_EARLY = 20  # iterations before which nothing is said of learning
_SURE = 50  # iterations after which no gain means that nothing is learned
_NOTABLE = 0.1  # of the spread within a group: a smaller gain is none
_MANY = 0.5  # share of groups without a signal, or of clipped ratios, that is too many
_OFF = 0.1  # how far the mean ratio may be from 1
_SPIKE = 20.0  # times the usual norm of the gradient
_FEW_PROMPTS, _OFTEN = 50, 20  # prompts, and visits of each, that are memorised


@dataclass(frozen=True)
class Verdict:
    """`kind` is one word for the check; `says` the fact and `do` what follows from it."""

    kind: str
    tone: Tone
    says: str
    do: str = ""


def verdicts(rows: Sequence[Row], config: Row) -> list[Verdict]:
    """All verdicts on a run, the most important first; at least one.

    `rows` are those of metrics.jsonl in their order, `config` that of config.json.
    """
    train = [row for row in rows if row.get("kind") != "eval"]
    evals = [row for row in rows if row.get("kind") == "eval"]
    causes = [
        found
        for found in (
            _diverging(train),
            _failing(train),
            _no_spread(train),
            _clipped(train),
            _ratio_gap(train),
        )
        if found
    ]
    hacked = _hacking(evals, config)
    finished = _finished(evals, config)
    progress = _progress(train, evals, worse=bool(hacked), finished=bool(finished))
    if progress.kind in ("flat", "early") and causes:
        told = [*causes]  # they say why
    else:
        told = [progress, *causes]
    if progress.kind in ("learning", "level"):
        told = [_milder(one) for one in told]
    others = [hacked, _few_prompts(train), finished, _resumed(rows)]
    told += [one for one in others if one]
    order = ("bad", "good", "warn", "plain")
    return sorted(told, key=lambda one: order.index(one.tone))


def held_out_key(evals: Sequence[Row]) -> str | None:
    """The metric that says how good the model is: accuracy where there is one."""
    for column in (metric_names.GUIDED, metric_names.UNGUIDED):
        for key in (
            metric_names.accuracy(metric_names.OVERALL, column),
            metric_names.reward(metric_names.AVERAGE, column),
        ):
            if any(key in row for row in evals):
                return key
    return None


# -- is it learning? -------------------------------------------------------------------


def _progress(
    train: Sequence[Row], evals: Sequence[Row], worse: bool, finished: bool
) -> Verdict:
    key = held_out_key(evals)
    points = _finite(evals, key) if key else []
    last = train[-1]["iteration"] + 1 if train else 0
    what = "held-out score" if key and "accuracy" in key else "held-out reward"
    if len(points) < 2:
        points, what = _training_points(train), "training reward"
    early = "most recipes show a rise after 50 to 200 iterations"
    if last < _EARLY or len(points) < 2:
        says = f"too early to tell: {_iterations(last)}"
        return Verdict("early", "plain", says, early)
    first, now = points[0], points[-1]
    total = now[1] - first[1]
    # The first and the last evaluation take more images than those between them: like
    # is compared with like.
    alike = points[1:-1] if finished else points[1:]
    base, end = (first, now) if len(alike) < 2 else (_base(alike), alike[-1])
    recent, span = end[1] - base[1], int(end[0] - base[0])
    notable = _NOTABLE * _spread(train, first[1])
    percent = what == "held-out score"
    best = max(value for _, value in points)
    if recent < -notable and end[1] < best - notable:
        return Verdict(
            "worse",
            "bad",
            f"getting worse: {what} {_signed(recent, percent)} over the last "
            f"{_iterations(span)}",
            "go back to an earlier checkpoint; lower train.learning_rate, or raise "
            "train.beta",
        )
    if recent > notable:
        rest = "" if worse else "; nothing else got worse"
        return Verdict(
            "learning",
            "good",
            f"learning: {what} {_signed(recent, percent)} over the last "
            f"{_iterations(span)}{rest}",
        )
    if total > notable:
        return Verdict(
            "level",
            "warn",
            f"level: {what} {_signed(total, percent)} since the start, and "
            f"{_signed(recent, percent)} over the last {_iterations(span)}",
            "if the score is good enough, stop here; otherwise a higher "
            "train.learning_rate, harder prompts, or a lower train.beta",
        )
    if last < _SURE:
        says = f"too early to tell: {what} {_signed(total, percent)} after "
        return Verdict("early", "plain", f"{says}{_iterations(last)}", early)
    return Verdict(
        "flat",
        "bad",
        f"not learning: {what} {_signed(total, percent)} over {_iterations(last)}",
        "raise train.learning_rate; look whether the training reward rises: if so, the "
        "average of the weights (train.ema) is behind, or the prompts are too few",
    )


def _training_points(train: Sequence[Row]) -> list[tuple[float, float]]:
    """Means over tenths of the run, so that noise does not decide."""
    points = _finite(train, metric_names.REWARD_AVERAGE)
    size = max(1, len(points) // 10)
    parts = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in parts
    ]


def _base(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The point that the last one is compared with: a third of the run before it."""
    last = points[-1][0]
    iteration = last - max(_EARLY, last / 3)
    earlier = [point for point in points[:-1] if point[0] <= iteration]
    return earlier[-1] if earlier else points[0]


def _spread(train: Sequence[Row], first: float) -> float:
    """By how much images of one prompt differ in their reward, as a rule."""
    values = [y for _, y in _finite(train, "reward_std_mean") if y > 0]
    return statistics.median(values) if values else max(abs(first), 1e-6)


# -- why not? ----------------------------------------------------------------------------


def _diverging(train: Sequence[Row]) -> Verdict | None:
    why = _not_finite(train) or _far_ratio(train) or _spike(train) or _collapse(train)
    if not why:
        return None
    return Verdict(
        "diverging",
        "bad",
        f"diverging: {why}",
        "lower train.learning_rate (by 3 to 10), raise train.beta, and start again "
        "from a checkpoint before it began",
    )


def _not_finite(train: Sequence[Row]) -> str:
    for row in train[-RECENT:]:
        for key in ("policy_loss", "loss", "grad_norm", "kl_loss", "ratio"):
            if not math.isfinite(row.get(key, 0.0)):
                title = metric_meanings.of(key).title.lower()
                return f"{title} is {row[key]} at iteration {row['iteration']}"
    return ""


def _far_ratio(train: Sequence[Row]) -> str:
    ratio = _recent(train, "ratio")
    return f"ratio off 1: {ratio:.3g}" if abs((ratio or 1.0) - 1.0) > _OFF else ""


def _spike(train: Sequence[Row]) -> str:
    norms = [y for _, y in _finite(train, "grad_norm")]
    few = max(1, min(RECENT, len(norms)) // 5)
    if len(norms) < _EARLY:
        return ""
    usual, now = statistics.median(norms[:-few]), statistics.median(norms[-few:])
    if now <= _SPIKE * usual or usual <= 0:
        return ""
    return f"the norm of the gradient is {now / usual:.0f} times its usual value"


def _collapse(train: Sequence[Row]) -> str:
    """The training reward has lost more than a whole spread from its best."""
    points = _training_points(train)
    if len(points) < 5:
        return ""
    best = max(points, key=lambda point: point[1])
    now = points[-1]
    if best[1] - now[1] <= _spread(train, best[1]):
        return ""
    return (
        f"training reward fell from {number(best[1])} (iteration {best[0]:.0f}) to "
        f"{number(now[1])}"
    )


def _failing(train: Sequence[Row]) -> Verdict | None:
    share = _recent(train, "reward_failed")
    if not share:
        return None
    return Verdict(
        "failing",
        "bad" if share > 0.05 else "warn",
        f"reward failing: {number(share, True)} of the prompts got no reward over the "
        f"last {_iterations(min(RECENT, len(train)))}",
        "read the run's lines about it; mend the reward, start its server again, or "
        "raise reward_deadline",
    )


def _no_spread(train: Sequence[Row]) -> Verdict | None:
    share = _recent(train, "zero_std_ratio")
    if share is None or share <= _MANY:
        return None
    return Verdict(
        "no_spread",
        "bad",
        f"not learning: {share:.0%} of groups have no spread: all images of a prompt "
        "get the same reward, and nothing is learned from them",
        "prompts that are neither solved nor hopeless, a reward with finer steps, a "
        "larger group_size, or more sample.noise_level",
    )


def _clipped(train: Sequence[Row]) -> Verdict | None:
    share = _recent(train, "clipfrac")
    if share is None or share <= _MANY:
        return None
    return Verdict(
        "clipped",
        "bad",
        f"not learning: {share:.0%} of the ratios are clipped away and teach nothing",
        "widen train.clip_range, lower train.learning_rate, or take fewer "
        "updates_per_iteration",
    )


def _ratio_gap(train: Sequence[Row]) -> Verdict | None:
    gap = _recent(train, "ratio_gap")
    if not gap or gap < 1e-6:
        return None
    return Verdict(
        "ratio_gap",
        "warn",
        f"ratio off 1 before anything has moved: by {number(gap)}",
        "rollout and update compute differently on this device: a fault to report, "
        "with environment.json",
    )


# -- what else -----------------------------------------------------------------------------


def _hacking(evals: Sequence[Row], config: Row) -> Verdict | None:
    settings = config.get("eval") or {}
    weights = settings.get("reward") or config.get("reward") or {}
    threshold = settings.get("monitor_threshold", 0.2)
    if len(evals) < 2 or not isinstance(weights, Mapping):
        return None
    worse = hacking.fallen(evals[0], evals[-1], weights, threshold)
    if not worse:
        return None
    parts = [_drift(name, evals) for name in worse]
    return Verdict(
        "hacking",
        "bad",
        f"hacking: {' and '.join(parts)} while the reward rises",
        "look at the pictures; raise train.beta, add a reward for what gets worse, or "
        "take the checkpoint before it began",
    )


def _drift(name: str, evals: Sequence[Row]) -> str:
    key = metric_names.monitor(name)
    fell = evals[-1][key] < evals[0][key]
    title = metric_meanings.of(key).title
    return f"{title[0].lower()}{title[1:]} {'falls' if fell else 'rises'}"


def _few_prompts(train: Sequence[Row]) -> Verdict | None:
    if not train or "trained_prompt_num" not in train[-1]:
        return None
    count = train[-1]["trained_prompt_num"]
    each = _recent(train, "trained_prompt_num_batch") or 0.0
    visits = (train[-1]["iteration"] + 1) * each / max(count, 1)
    if count >= _FEW_PROMPTS or visits < _OFTEN:
        return None
    return Verdict(
        "few_prompts",
        "warn",
        f"too few prompts: {count:.0f}, each of them seen {visits:.0f} times",
        "the model learns these by heart; give some hundreds, and hold others out in "
        "eval.prompts",
    )


def _finished(evals: Sequence[Row], config: Row) -> Verdict | None:
    last = config.get("num_iterations")
    if not evals or evals[-1]["iteration"] != last or not last:
        return None
    return Verdict(
        "finished",
        "plain",
        f"finished: all {_iterations(last)}",
        "compare it with the base model (python -m flowgrpo_jax.compare), or export it "
        "(python -m flowgrpo_jax.export)",
    )


def _resumed(rows: Sequence[Row]) -> Verdict | None:
    starts: list[int] = []
    seen = 1
    for row in rows:
        process = row.get(metric_names.PROCESS, 1)
        if process > seen:
            starts.append(row["iteration"])
            seen = process
    if not starts:
        return None
    times = "once" if len(starts) == 1 else f"{len(starts)} times"
    return Verdict(
        "resumed",
        "plain",
        f"resumed {times}, at iteration {', '.join(map(str, starts[-5:]))}",
        "nothing: the rows are those of a run that was never stopped",
    )


# -- helpers -------------------------------------------------------------------------------


def _milder(verdict: Verdict) -> Verdict:
    """What a run has that learns all the same is a warning."""
    if verdict.kind not in ("no_spread", "clipped"):
        return verdict
    says = verdict.says.removeprefix("not learning: ")
    return Verdict(verdict.kind, "warn", says, verdict.do)


def _finite(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    pairs = [(float(row["iteration"]), float(row[key])) for row in rows if key in row]
    return [(x, y) for x, y in pairs if math.isfinite(y)]


def _recent(train: Sequence[Row], key: str) -> float | None:
    values = [y for _, y in _finite(train[-RECENT:], key)]
    return statistics.fmean(values) if values else None


def _iterations(count: int | float) -> str:
    return f"{count:,.0f} iteration{'s' * (count != 1)}"


def _signed(change: float, percent: bool) -> str:
    if percent:
        return f"{100 * change:+.1f} points".replace("-", "−")
    return f"{change:+.3g}".replace("-", "−")

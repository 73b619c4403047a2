"""What every metric means, how it should look, and what to do where it does not.

`of` answers for any name of metrics.jsonl. The page of a run takes titles, units and
notes from here, the boards take groups, and the warning of reward hacking takes from
`better` which change of a monitor is for the worse.
"""

from dataclasses import dataclass

from flowgrpo_jax.runtime import metric_names as names

# Where a metric belongs, in the order of the page.
REWARD, HELD_OUT, TASKS, MONITORS, UPDATE, WORK, TIME = GROUPS = (
    *("reward", "held_out", "tasks", "monitors", "update", "work", "time"),
)


@dataclass(frozen=True)
class Meaning:
    """One metric: `means` says what it is, `healthy` how it looks in a run that learns.

    `unit` stands behind the numbers; "%" also says that values are shares of 1.
    `better` is 1 where higher is better, -1 where lower is, 0 where neither is.
    """

    title: str
    means: str
    healthy: str = ""
    remedy: str = ""
    unit: str = ""
    better: int = 0
    group: str = UPDATE


def of(metric: str) -> Meaning:
    """The meaning of any metric; one that nobody has described has its name as title."""
    if metric in _WHOLE:
        return _WHOLE[metric]
    read = names.parse(metric)
    if read.kind == "reward":
        return _reward(read)
    if read.kind == "accuracy":
        return Meaning(
            _words(read.name),
            "share of images that are right",
            unit="%",
            better=1,
            group=TASKS,
        )
    if not read.column and names.is_time(metric):
        return Meaning(metric.split("/")[-1], "", group=TIME)
    known = MEANINGS.get(read.name)
    if known is None:
        if read.column:
            return Meaning(_words(read.name), "", group=MONITORS)
        return Meaning(metric, "")
    return known


def tag(metric: str) -> str:
    """The name of a metric on TensorBoard and wandb: `group/name`, name as in the rows.

    Both fold what has one group; a search for the name finds it all the same.
    """
    if names.is_time(metric):
        return metric
    return f"{of(metric).group}/{metric}"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _reward(read: names.Metric) -> Meaning:
    name = read.name.replace("_", " ")
    if not read.column:
        if read.name == names.AVERAGE:
            return MEANINGS["reward"]
        return Meaning(
            f"Reward {name}", "mean over the images of training", better=1, group=REWARD
        )
    if read.name == names.AVERAGE:
        return Meaning(
            "Held-out reward",
            "weighted sum of the rewards on prompts that are not trained on; the first "
            "and the last evaluation take more of them",
            "rises with the training reward",
            "if it does not: more prompts, or a lower learning rate",
            better=1,
            group=HELD_OUT,
        )
    return Meaning(
        f"Held-out {name}",
        "mean over the images of held-out prompts",
        better=1,
        group=HELD_OUT,
    )


# Metrics of training, and monitors by their name behind the column.
MEANINGS = {
    # -- rewards of training ---------------------------------------------------------
    "reward": Meaning(
        "Training reward",
        "weighted sum of the rewards, mean over the rollout",
        "rises over tens to hundreds of iterations, with noise",
        "flat: look at the groups without a signal and the clip fraction",
        better=1,
        group=REWARD,
    ),
    "reward_std_mean": Meaning(
        "Reward spread",
        "standard deviation of the reward within a group, mean over the groups",
        "well above zero; it shrinks slowly as prompts are solved",
        "near zero: raise sample.noise_level or group_size, or take a finer reward",
        group=REWARD,
    ),
    "zero_std_ratio": Meaning(
        "Groups without a signal",
        "share of groups in which all images have the same reward",
        "below a half",
        "prompts of middling difficulty, a finer reward, a larger group_size",
        unit="%",
        better=-1,
        group=REWARD,
    ),
    "reward_failed": Meaning(
        "Prompts without a reward",
        "share of prompts whose reward failed; they teach nothing",
        "zero",
        "read the lines that the run printed, and mend the reward or its server",
        unit="%",
        better=-1,
        group=REWARD,
    ),
    # -- the update ------------------------------------------------------------------
    "kl_loss": Meaning(
        "KL to the reference",
        "how far the policy has moved from the base model",
        "rises slowly and levels off",
        "rises faster and faster: raise train.beta or lower train.learning_rate",
    ),
    "ema_kl_loss": Meaning(
        "KL to the average", "distance of the policy from its own moving average"
    ),
    "norm_excess": Meaning(
        "Velocity too long", "how much longer the velocity is than the reference's"
    ),
    "clipfrac": Meaning(
        "Clip fraction",
        "share of ratios that the clip range held back: they teach nothing",
        "below a half",
        "widen train.clip_range, lower train.learning_rate, or updates_per_iteration",
        unit="%",
    ),
    "clipfrac_gt_one": Meaning(
        "Clipped above", "share of ratios above what the clip range allows", unit="%"
    ),
    "clipfrac_lt_one": Meaning(
        "Clipped below", "share of ratios below what the clip range allows", unit="%"
    ),
    "ratio": Meaning(
        "Probability ratio",
        "mean of new over old policy",
        "close to 1",
        "off by more than 0.1: lower train.learning_rate",
    ),
    "ratio_gap": Meaning(
        "Gap of the first ratio",
        "largest |log-ratio| before anything has moved",
        "exactly 0",
        "not 0: rollout and update computed differently; no recipe mends that",
    ),
    "approx_kl": Meaning(
        "Approximate KL", "between the new policy and the one that sampled", "small"
    ),
    "policy_loss": Meaning(
        "Policy loss",
        "what the update minimises, less the regularizers",
        "near zero on-policy; its value says little",
    ),
    "loss": Meaning("Loss", "what the update minimises", "falls", better=-1),
    "flow_matching_loss": Meaning(
        "Flow-matching loss", "mean squared error of the velocity", "falls", better=-1
    ),
    "grad_norm": Meaning(
        "Gradient norm",
        "before clipping",
        "steady, without spikes of ten times its usual value",
        "spikes: lower train.learning_rate",
    ),
    # -- what an iteration consists of -------------------------------------------------
    "group_size": Meaning(
        "Group size", "images that are compared with each other, mean", group=WORK
    ),
    "trained_prompt_num": Meaning(
        "Different prompts", "that the run has trained on so far", group=WORK
    ),
    "trained_prompt_num_batch": Meaning(
        "Prompts of an iteration", "different ones", group=WORK
    ),
    "actual_batch_size": Meaning(
        "Entries with an advantage", "what the updates learn from", group=WORK
    ),
    "nfe_rollout": Meaning(
        "Evaluations of the rollout", "of the network, while sampling", group=WORK
    ),
    "nfe_update": Meaning(
        "Evaluations of the update", "of the network, forward and back", group=WORK
    ),
    "nfe_occupancy": Meaning(
        "Occupancy",
        "share of a microbatch that is in use while sampling",
        "near 100%",
        unit="%",
        group=WORK,
    ),
    "decoded_images": Meaning("Decoded images", "of an iteration", group=WORK),
    "height": Meaning("Height", "of the images of an iteration", unit="px", group=WORK),
    "width": Meaning("Width", "of the images of an iteration", unit="px", group=WORK),
    # -- monitors: measured at evaluations, never optimised --------------------------
    "diversity": Meaning(
        "Diversity",
        "RGB distance of images of one prompt",
        "stays: a fall says that images become alike",
        better=1,
        group=MONITORS,
    ),
    "clip_diversity": Meaning(
        "Diversity in CLIP's space",
        "cosine distance of images of one prompt",
        "stays: a fall says that images become alike",
        better=1,
        group=MONITORS,
    ),
    "color_entropy": Meaning(
        "Colour entropy",
        "of objects whose colour the prompt leaves open",
        "stays: a fall says that one colour takes over",
        unit="bits",
        better=1,
        group=MONITORS,
    ),
    "saturation": Meaning(
        "Saturation",
        "mean of HSV",
        "stays: a rise says that colours become too strong",
        better=-1,
        group=MONITORS,
    ),
    "high_frequency": Meaning(
        "Dots and grids",
        "root mean square of what a 3x3 mean removes",
        "stays: a rise says that fine patterns appear",
        better=-1,
        group=MONITORS,
    ),
    "background_texture": Meaning(
        "Texture of the background",
        "what differs there from pixel to pixel",
        "stays: a rise says that dots or noise appear",
        better=-1,
        group=MONITORS,
    ),
    "background_energy": Meaning(
        "Energy of the background",
        "deviation of the pixels off the objects",
        group=MONITORS,
    ),
    "objects": Meaning(
        "Objects", "that the detector finds in an image", group=MONITORS
    ),
    "unknown": Meaning(
        "Unknown objects",
        "share of objects of no known shape",
        unit="%",
        group=MONITORS,
    ),
    "monitors_worse": Meaning(
        "Monitors that got worse",
        "while the reward rose",
        "zero",
        "look at the pictures: higher train.beta, or stop earlier",
        group=MONITORS,
    ),
}

_WHOLE = {
    names.GAP: Meaning(
        "Gain of the sampler of training",
        "its reward less that of the deterministic one",
        "steady: a rise says that learning helps the noisy sampler alone",
        group=MONITORS,
    ),
    names.accuracy(names.OVERALL): Meaning(
        "Held-out score",
        "share of images that are right, mean over the tasks; the first and the last "
        "evaluation take more prompts",
        "rises with the training reward",
        unit="%",
        better=1,
        group=HELD_OUT,
    ),
    names.WALL: Meaning("Wall time", "of the run so far", unit="s", group=TIME),
    names.PROCESS: Meaning(
        "Process", "how many times the run was started so far", group=TIME
    ),
    names.PEAK_MEMORY: Meaning(
        "Memory", "largest of the process on the host", unit="GB", group=TIME
    ),
    names.IMAGES_PER_SECOND: Meaning(
        "Throughput", "images of training", unit="images/s", better=1, group=TIME
    ),
    names.EVALUATION: Meaning("Time of an evaluation", "", unit="s", group=TIME),
    names.ROLLOUT: Meaning("Time of the rollout", "", unit="s", group=TIME),
    names.REWARD: Meaning(
        "Time of the rewards", "beyond what sampling hides", unit="s", group=TIME
    ),
    names.UPDATE: Meaning("Time of the update", "", unit="s", group=TIME),
}
_WHOLE |= {
    names.accuracy(names.OVERALL, column): _WHOLE[names.accuracy(names.OVERALL)]
    for column in (names.UNGUIDED, names.STOCHASTIC, names.PLAIN)
}

"""What must hold for a config before a run begins."""

import ml_collections

from flowgrpo_jax.config import families, recipes, values
from flowgrpo_jax.config.values import WINDOWS
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.rewards import registry
from flowgrpo_jax.rl.objectives.table import OBJECTIVES, PRETRAINING
from flowgrpo_jax.worlds.registry import WORLDS

_CLIPPING = ("ppo_clip", "guard", "awm", "dgpo")


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError (key, value, what is allowed) for a config that cannot run."""
    values.check(config)
    _check_rewards(config)
    policy = config.train.objective != PRETRAINING
    if policy and config.group_size < 2:
        raise UserError(
            f"group_size: {config.group_size}: must be at least 2: an advantage "
            "compares the images of one prompt"
        )
    if config.prompts_per_iteration % config.updates_per_iteration:
        raise UserError(
            f"updates_per_iteration: {config.updates_per_iteration}: must divide "
            f"prompts_per_iteration ({config.prompts_per_iteration})"
        )
    _check_axes(config)
    _check_learning(config)


def _check_rewards(config: ml_collections.ConfigDict) -> None:
    for key, weights in (
        ("reward", config.reward),
        ("eval.reward", config.eval.reward),
    ):
        for name in weights:
            if not registry.is_known(name, config.reward_options.get(name, ())):
                raise not_one_of(key, name, registry.REWARDS)
        if weights and not any(weights.values()):
            raise UserError(f"{key}: {weights.to_dict()}: one weight must not be 0")
    if not config.reward:
        raise UserError(
            f"reward: {{}}: give a weight to one of {', '.join(registry.REWARDS)}"
        )
    for name in config.reward_options:
        if name not in _measured(config) and not registry.is_known(name):
            raise UserError(
                f"reward_options.{name}: no reward of this run: must be one of "
                f"{', '.join(_measured(config))}"
            )


def _measured(config: ml_collections.ConfigDict) -> list[str]:
    """Names of all that a run measures."""
    names = [*config.reward, *config.eval.reward, *config.monitors]
    return list(dict.fromkeys(names))


def _check_learning(config: ml_collections.ConfigDict) -> None:
    """Values that are numbers like others, and with which nothing would be learned."""
    train = config.train
    if train.objective in _CLIPPING and not train.clip_range:
        raise UserError(
            f"train.clip_range: 0: must be above 0: train.objective {train.objective} "
            "would follow no ratio"
        )
    if train.objective == PRETRAINING:
        world = WORLDS.get(config.model)
        kinds = world.kinds if world else [k for w in WORLDS.values() for k in w.kinds]
        for name in train.caption_noise:
            if name not in kinds:
                raise not_one_of("train.caption_noise", name, kinds)


def remarks(config: ml_collections.ConfigDict) -> list[str]:
    """Lines for what can run, and is hardly what was meant."""
    train, last = config.train, config.num_iterations
    told = [
        f"reward_options.{name}: is not used: no reward or monitor of this run"
        for name in config.reward_options
        if name not in _measured(config)
    ]
    family, authors = families.of(config.model), recipes.recipe(config.recipe).authors
    if family.trained_as and authors and family.trained_as not in authors:
        told.append(
            f"recipe: {config.recipe}: its authors trained {' and '.join(authors)}, no "
            f"model of the family of {config.model}: the learning rate, the group size "
            "and whatever else it leaves open are the defaults of that family"
        )
    if last and train.decay_iterations > last:
        told.append(
            f"train.decay_iterations: {train.decay_iterations}: more than the {last} "
            f"iterations of the run: the learning rate begins at {last} / "
            f"{train.decay_iterations} of train.learning_rate"
        )
    elif last and train.warmup_iterations > last - train.decay_iterations:
        told.append(
            f"train.warmup_iterations: {train.warmup_iterations}: does not end before "
            f"the {last - train.decay_iterations} iterations that it has: "
            "train.learning_rate is not reached by it"
        )
    updates = last * config.updates_per_iteration
    follows = train.behaviour in ("copy", "ema")
    if last and follows and train.behaviour_every > updates:
        told.append(
            f"train.behaviour_every: {train.behaviour_every}: more than the {updates} "
            "updates of the run: what samples stays the base model"
        )
    pretraining = train.objective == PRETRAINING
    images = config.prompts_per_iteration * (1 if pretraining else config.group_size)
    if config.microbatch > images and config.sample.plan not in ("branch", "tree"):
        told.append(
            f"microbatch: {config.microbatch}: more than the {images} images of an "
            "iteration: the rest of it is computed and thrown away"
        )
    return told


def _check_axes(config: ml_collections.ConfigDict) -> None:
    """Combinations of axes that cannot be, however good each of them is."""
    sample, train = config.sample, config.train
    if train.objective == PRETRAINING:
        return
    samples = OBJECTIVES[train.objective].consumes == "samples"
    same = (0.0, sample.guidance_scale)
    if not samples and train.guidance_scale not in same:
        raise UserError(
            f"train.guidance_scale: {train.guidance_scale}: must be 0 or that of "
            f"sampling ({sample.guidance_scale}): train.objective {train.objective} "
            "compares with the probabilities of what was sampled"
        )
    if sample.plan in ("branch", "tree") and sample.init_noise != "shared":
        raise UserError(
            f"sample.init_noise: {sample.init_noise}: must be shared, since the "
            f"plan {sample.plan} goes to its stochastic step once for a whole group"
        )
    if samples and (sample.plan in ("branch", "tree") or sample.probe_steps):
        raise UserError(
            f"sample.plan: {sample.plan}: train.objective {train.objective} learns "
            "from whole images, one per member: take ode or all, without probe_steps"
        )
    if not samples and sample.plan == "ode":
        raise UserError(
            f"sample.plan: ode: train.objective {train.objective} learns from "
            "stochastic steps, and the ODE has none: take all or a window"
        )
    if sample.sde_type == "cps" and train.objective in ("guard", "dppo"):
        raise UserError(
            f"sample.sde_type: cps: its log-prob has no scale, which train.objective "
            f"{train.objective} needs: take cps_gaussian"
        )
    if samples and train.update_order == "steps":
        raise UserError(
            f"train.update_order: steps: train.objective {train.objective} has no "
            "steps: take chunks"
        )
    if (train.backup == "difference") != bool(sample.probe_steps):
        raise UserError(
            f"train.backup: {train.backup}: difference and sample.probe_steps "
            f"({sample.probe_steps}) go together"
        )
    if sample.finish_ratio and sample.plan not in WINDOWS:
        raise UserError(
            f"sample.finish_ratio: {sample.finish_ratio}: the plan {sample.plan} has no "
            f"window to finish after: take one of {', '.join(WINDOWS)}"
        )
    levels = tuple(sample.noise_levels)
    if levels and len(levels) != sample.num_steps:
        raise UserError(
            f"sample.noise_levels: {levels}: must be one for each of the "
            f"{sample.num_steps} steps"
        )

"""Scores of weights that are there: as a run evaluates itself, or by a protocol."""

from ml_collections import ConfigDict

from flowgrpo_jax.assemble import sizes, specs
from flowgrpo_jax.assemble.prompts import check_prompts, load_prompt_set
from flowgrpo_jax.assemble.restore import Restored, make_pipeline, place
from flowgrpo_jax.assemble.rewards import (
    make_eval_reward,
    make_monitor,
    reward_context,
)
from flowgrpo_jax.inference import protocols
from flowgrpo_jax.inference.evaluator import Evaluator
from flowgrpo_jax.rewards import registry


def evaluate(
    config: ConfigDict, restored: Restored, rewards: registry.Context | None = None
) -> dict[str, float]:
    """The scores of the final evaluation of a run, for a `restore.Restored`.

    `rewards` is the context of `try_rewards`, if it was called.
    """
    prompts = load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    context = rewards or reward_context(config)
    check_prompts(config, context, prompts, "eval.prompts")
    placed = place(config, restored, [prompt.text for prompt in prompts])
    models = sizes.models(config, restored.model, sizes.of_evaluation(config))
    evaluator = Evaluator(
        specs.eval_spec(config, *models.values()),
        placed.mesh,
        placed.specs,
        prompts,
        placed.text,
        make_eval_reward(config, context),
        make_monitor(config, context),
    )
    return evaluator(placed.variables, final=True).scores


def measure(
    config: ConfigDict,
    restored: Restored,
    protocol: str,
    max_prompts: int | None = None,
    rewards: registry.Context | None = None,
) -> dict[str, float]:
    """The scores of a `restore.Restored` by a protocol that the config is made for.

    `max_prompts` takes that many of every task. `rewards` as in `evaluate`.
    """
    prompts = load_prompt_set(config.eval.prompts, "test", "eval.prompts")
    if max_prompts is not None:
        prompts = protocols.first_of_each_task(prompts, max_prompts)
    context = rewards or reward_context(config)
    check_prompts(config, context, prompts, "eval.prompts")
    reward = make_eval_reward(config, context)
    pipeline, variables = make_pipeline(config, restored, prompts)
    images = protocols.PROTOCOLS[protocol].images_per_prompt
    return protocols.measure(pipeline, variables, prompts, reward, images)

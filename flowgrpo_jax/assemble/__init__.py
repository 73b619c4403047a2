"""From a config to specs, models, prompts, rewards and runs. What these do is not here.

The last floor that knows ml_collections.
"""

from flowgrpo_jax.assemble.model import (
    abstract_model,
    fresh_networks,
    load_model,
    model_spec,
    new_model,
    save_result,
    starting_model,
    starts_fresh,
    trainable_part,
    warm_start,
    weights_dtype,
)
from flowgrpo_jax.assemble.objective import fixed_policies, make_behaviour, make_loss
from flowgrpo_jax.assemble.prompts import (
    PROMPT_SETS,
    check_prompts,
    judgeable,
    load_prompt_set,
    with_metadata,
)
from flowgrpo_jax.assemble.rewards import (
    make_eval_reward,
    make_monitor,
    make_reward,
    reward_context,
    try_rewards,
    world_of,
)
from flowgrpo_jax.assemble.sampler import (
    check_actions,
    make_eval_sampler,
    make_sampler,
    make_sigmas,
)
from flowgrpo_jax.assemble.text import make_text_table
from flowgrpo_jax.assemble.work import make_policy_work, make_work, pretrains

__all__ = [
    "PROMPT_SETS",
    "abstract_model",
    "check_actions",
    "check_prompts",
    "fixed_policies",
    "fresh_networks",
    "judgeable",
    "load_model",
    "load_prompt_set",
    "make_behaviour",
    "make_eval_reward",
    "make_eval_sampler",
    "make_loss",
    "make_monitor",
    "make_policy_work",
    "make_reward",
    "make_sampler",
    "make_sigmas",
    "make_text_table",
    "make_work",
    "model_spec",
    "new_model",
    "pretrains",
    "reward_context",
    "save_result",
    "starting_model",
    "starts_fresh",
    "trainable_part",
    "try_rewards",
    "warm_start",
    "weights_dtype",
    "with_metadata",
    "world_of",
]

"""From a config to typed specs, models, prompts, rewards, samplers; nothing is run.

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
from flowgrpo_jax.assemble.prompts import PROMPT_SETS, check_prompts, load_prompt_set
from flowgrpo_jax.assemble.rewards import (
    make_eval_reward,
    make_monitor,
    make_reward,
    reward_context,
    try_rewards,
)
from flowgrpo_jax.assemble.sampler import (
    check_actions,
    make_eval_sampler,
    make_sampler,
    make_sigmas,
)
from flowgrpo_jax.assemble.text import make_text_table

__all__ = [
    "PROMPT_SETS",
    "abstract_model",
    "fresh_networks",
    "model_spec",
    "check_actions",
    "check_prompts",
    "fixed_policies",
    "load_model",
    "load_prompt_set",
    "make_behaviour",
    "make_eval_reward",
    "make_eval_sampler",
    "make_loss",
    "make_monitor",
    "make_reward",
    "make_sampler",
    "make_sigmas",
    "make_text_table",
    "new_model",
    "reward_context",
    "save_result",
    "starting_model",
    "starts_fresh",
    "trainable_part",
    "try_rewards",
    "warm_start",
    "weights_dtype",
]

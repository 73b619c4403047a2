"""GenEval by Flow-GRPO: prompts about objects, counts, colours and places.

Default: the embedded model, so that a laptop runs it with no download. Scores before
and after, of three seeds: docs/results.md. About 0.7 s an iteration on two CPU cores.
Command: python -m flowgrpo_jax.main --config=configs/geneval.py
Choose:  configs/geneval.py:recipe=flow_grpo (every step stochastic, as in the paper)
"""

from flowgrpo_jax import config as configs


def get_config(arg=None):
    return configs.make(
        arg,
        recipe="flow_grpo_fast_v1",
        num_iterations=400,
        prompts_per_iteration=32,
        group_size=16,
        reward_options={"geneval": {"extra_object_penalty": 0.35}},
        # Learning without guidance is half the price and moves the model itself;
        # scores are told with guidance and without.
        sample__guidance_scale=1.0,
        eval__guidance_scale=1.5,
        eval__every=100,
        checkpoint__every=100,
        # What reads the prompt and the time learns. What paints keeps its weights: a
        # policy gradient is mostly noise, and there it would show as a dotted ground.
        train__use_lora=False,
        train__parameters="add_|context|time_text",
        train__learning_rate=1e-4,
        train__decay_iterations=100,
        train__adam_eps=1e-10,
        train__weight_decay=0.0,
    )

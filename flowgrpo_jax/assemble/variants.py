"""A config as a command changes it: another sampler, a pipeline's defaults, a protocol."""

from ml_collections import ConfigDict

from flowgrpo_jax import config as configs
from flowgrpo_jax.config import checks, families
from flowgrpo_jax.errors import UserError, not_one_of
from flowgrpo_jax.inference.protocols import PROTOCOLS


def model_config(model: str) -> ConfigDict:
    """A config that samples `model` with the defaults of its pipeline in diffusers."""
    config = configs.make(model=model)
    for key, value in families.of(model).sampling.items():
        configs.assign(config, key, value)
    return config


def with_options(
    config: ConfigDict, seed: int, guidance_scale: float | None, num_steps: int | None
) -> ConfigDict:
    """The config with these options of its evaluation sampler; None leaves one."""
    config = configs.from_json(config.to_dict())
    config.eval.seed = seed
    if guidance_scale is not None:
        config.eval.guidance_scale = guidance_scale
    if num_steps is not None:
        config.sample.eval_num_steps = num_steps
    checks.check(config)
    return config


def by_protocol(
    config: ConfigDict, name: str, prompts: str | None = None
) -> ConfigDict:
    """The config as the protocol has it; `prompts` is a set or file in place of its own.

    UserError for an unknown protocol, or for one that needs a list of prompts.
    """
    if name not in PROTOCOLS:
        raise not_one_of("--protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    if not (prompts or protocol.prompts):
        raise UserError(
            f"--protocol: {name}: needs its prompts: give --prompts=FILE.txt or .jsonl"
        )
    config = configs.from_json(config.to_dict())
    config.eval.prompts = prompts or protocol.prompts
    config.sample.eval_num_steps = protocol.num_steps
    if protocol.reward:
        values = config.to_dict()
        values["eval"]["reward"] = dict(protocol.reward)
        config = configs.from_json(values)
    checks.check(config)
    return config

"""Online reinforcement learning for flow-matching image models, in JAX.

The names below are imported when they are first asked for: importing the package takes
milliseconds, and jax comes with the first of them that needs it.

    config      configs by task: config.load("configs/geneval.py:recipe=g2rpo")
    recipes     the table of algorithms: name -> Recipe
    train       train(config, workdir): a run, resumed where it was left
    load        load(workdir, config or model) -> a policy: sample, evaluate, export
    reward      reward(name, **options) -> a function (images, prompts) -> scores
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "config", "load", "recipes", "reward", "train"]

# Public name -> (module, name in it); None for the module itself.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "config": ("flowgrpo_jax.config", None),
    "recipes": ("flowgrpo_jax.config.recipes", "RECIPES"),
    "train": ("flowgrpo_jax.train", None),  # a module that can be called
    "load": ("flowgrpo_jax.assemble.policy", "load"),
    "reward": ("flowgrpo_jax.rewards.registry", "reward"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _PUBLIC[name]
    found = importlib.import_module(module)
    return found if inside is None else getattr(found, inside)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `python -m flowgrpo_jax.main` and its like, whose name stands there a moment later:
# signals are this package's from the first line on. An import changes nothing.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until those of `stopping` are there
    from flowgrpo_jax.runtime import stopping

    stopping.install()

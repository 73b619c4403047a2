"""Online reinforcement learning for flow-matching image models, in JAX."""

import sys

# `python -m flowgrpo_jax.main` and its like, whose name stands there a moment later:
# signals are this package's from the first line on. An import changes nothing.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until those of `stopping` are there
    from flowgrpo_jax.runtime import stopping

    stopping.install()

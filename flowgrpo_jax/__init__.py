"""Online reinforcement learning for flow-matching image models, in JAX."""

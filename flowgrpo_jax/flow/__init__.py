"""Sampling: schedule, transition, plan, packing, rollout. No rewards, no learning."""

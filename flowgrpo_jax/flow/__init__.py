"""Sampling: schedule, transition, plan, rollout."""

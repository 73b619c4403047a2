"""Rewards score images by their prompts' metadata; detectors and monitors are here too.

What a score is worth to the policy (advantages) is in `rl`; networks are in `models`.
"""

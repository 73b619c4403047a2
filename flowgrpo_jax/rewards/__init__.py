"""Images and metadata to scores: rewards, detectors, monitors. No learning.

What a score is worth to the policy (advantages) is in `rl`; networks are in `models`.
"""

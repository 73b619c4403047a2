"""Objectives: one room an algorithm, shared pieces, and the table of them all.

How a policy is asked, weighed by step and penalised stands in `rl.losses`.
"""

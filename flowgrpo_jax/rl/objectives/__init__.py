"""One room an algorithm, shared pieces, and the table of them all. No networks.

How a policy is asked, weighed by step and penalised stands in `rl.losses`.
"""

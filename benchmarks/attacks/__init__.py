"""Attacks on the reliability of the package, each a row of docs/reliability.md.

A file of this folder per surface gives `rows()`; `python -m benchmarks.attacks` runs
them all and writes the table.
"""

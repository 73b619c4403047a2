"""Fuzzing: nothing that a user hands in may end in a traceback, a hang or a lie.

A surface is a place where input of others comes in. A file of this folder per surface
gives a `Surface`: how to draw inputs, and a check that feeds one to the package and
compares what came out with an oracle. `python -m benchmarks.fuzz` runs them.
"""

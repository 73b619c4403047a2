"""Ready sweeps, by their file: --sweep=launch/sweeps/seeds.py. No code but sweep(hyper)."""

"""The process in which atheris mutates bytes; `core.run_bytes` starts it.

`python -m benchmarks.fuzz.with_atheris SURFACE RESULT INPUTS SEED`
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flowgrpo_jax"]):
    from benchmarks.fuzz import core
    from benchmarks.fuzz.__main__ import surface_of


def main() -> None:
    name, result, inputs, seed = sys.argv[1:]
    surface = surface_of(name)
    assert surface.check_bytes is not None
    tally = core.Tally()
    last = int(inputs)

    def one(data: bytes) -> None:
        core.try_one(surface.check_bytes, data, surface.seconds, tally)
        if sum(tally.counts.values()) == last:
            Path(result).write_text(json.dumps([tally.counts, tally.examples]))

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed_bytes in enumerate(surface.seeds):
            (Path(corpus) / str(number)).write_bytes(seed_bytes)
        # A few more than are counted: the first run is libFuzzer's own, of no bytes.
        options = [f"-runs={last + 10}", f"-seed={seed}", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *options, "-timeout=0", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

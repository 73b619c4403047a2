"""Rewards that exit, hang, fork, flood or meddle: what becomes of the run.

    python -m benchmarks.bad_rewards              # 60 tries each; writes the table
    python -m benchmarks.bad_rewards --tries=6

Those that fail are whole commands (`flowgrpo_jax.main`), each in another way: right is
exit code 2, one error line that names the reward, and a traceback, if any, of the user's
frames alone. Those that succeed are calls in one process, as a run makes them (on a
thread, beside another reward, signals held): right are the scores of both rewards, with
folder and images as before. The time is from the last line to the end of the process.
"""

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sections

HEAD = (
    "| a reward that | as | tries | right | slowest end after its line, s |\n"
    "|---|---|---|---|---|"
)
_TRY = "BAD_REWARD_TRY"
_CONFIG = """
from flowgrpo_jax import config as configs
def get_config(arg=None):
    return configs.make(
        arg, reward={"benchmarks.bad_rewards.NAME": 1.0}, reward_deadline=1.0
    )
"""


# -- rewards that fail ---------------------------------------------------------------


def exits(images, prompts):
    _way(
        lambda: sys.exit(1),
        lambda: sys.exit("a text"),
        lambda: sys.exit(),
        lambda: _raise(KeyboardInterrupt()),
        lambda: _raise(GeneratorExit()),
        lambda: argparse.ArgumentParser().parse_args(["--nosuchflag"]),
    )


def hangs(images, prompts):
    _way(
        lambda: time.sleep(3600),
        _spin,
        lambda: subprocess.run(["sleep", "3600"]),
        lambda: threading.Event().wait(),
        lambda: multiprocessing.get_context("fork").Pool(2).map(time.sleep, [3600] * 4),
        lambda: threading.Thread(target=time.sleep, args=[3600], daemon=False).run(),
    )


def _way(*ways: Callable[[], Any]) -> None:
    """Do it in another way each time; what is left behind must not matter."""
    threading.Thread(target=time.sleep, args=[3600], daemon=False).start()
    ways[int(os.environ[_TRY]) % len(ways)]()


def _raise(error: BaseException) -> None:
    raise error


def _spin() -> None:
    while True:
        pass


# -- rewards that succeed ------------------------------------------------------------


def forks(images, prompts):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(np.mean, list(images))


def exits_in_a_child(images, prompts):
    for end in (lambda: os._exit(1), lambda: sys.exit(1), lambda: None):
        if (child := os.fork()) == 0:
            return end()
        os.waitpid(child, 0)
    return images.mean((1, 2, 3))


def floods(images, prompts):
    print("flood " * (20 * 2**20 // 6))
    return images.mean((1, 2, 3))


def changes_images(images, prompts):
    scores = images.mean((1, 2, 3))
    images -= 0.5
    images /= 0.1
    return scores, {"more": images}


def changes_prompts(images, prompts):
    for prompt in prompts:
        prompt.metadata["include"].clear()
        prompt.metadata.clear()
    prompts.clear()
    return images.mean((1, 2, 3))


def changes_folder(images, prompts):
    os.chdir("/")
    return images.mean((1, 2, 3))


def calm(images, prompts):
    return images.mean((1, 2, 3)) + sum(len(one.metadata) for one in prompts)


FAILING = ("exits", "hangs")
SUCCEEDING = (
    *("forks", "exits_in_a_child", "floods"),
    *("changes_images", "changes_prompts", "changes_folder"),
)


# -- tries ---------------------------------------------------------------------------


def command(name: str, number: int, folder: Path) -> tuple[bool, float]:
    """One run with that reward: (right, seconds from its line to its end)."""
    config = folder / f"{name}.py"
    config.write_text(_CONFIG.replace("NAME", name))
    lines, end, code = watched(
        [
            *(sys.executable, "-m", "flowgrpo_jax.main"),
            *(f"--config={config}", f"--workdir={folder / 'run'}"),
        ],
        {_TRY: str(number)},
    )
    told = [(at, line) for at, line in lines if line.startswith("error: ")]
    frames = [line for _, line in lines if line.startswith('  File "')]
    right = (
        code == 2
        and len(told) == 1
        and f"bad_rewards.{name}" in told[0][1]
        and all("flowgrpo_jax/" not in frame for frame in frames)
    )
    if not right:
        print(*(line for _, line in lines), f"exit code {code}", sep="\n")
    return right, end - told[-1][0] if told else float("inf")


def watched(
    arguments: Sequence[str], environment: dict[str, str]
) -> tuple[list[tuple[float, str]], float, int]:
    """(time and text of each line of stderr, time of its end, exit code)."""
    lines: list[tuple[float, str]] = []
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((time.monotonic(), line.rstrip("\n")))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code = process.wait(600)
    end = time.monotonic()
    reader.join(1.0)  # a process that was left behind may hold the other end
    try:
        os.killpg(process.pid, 9)  # such as `sleep`
    except ProcessLookupError:
        pass
    return lines, end, code


def calls(name: str, tries: int) -> None:
    """So many calls as a run makes them; the count of right ones goes to stderr."""
    from flowgrpo_jax.data.prompts import Prompt
    from flowgrpo_jax.rewards.registry import combine
    from flowgrpo_jax.rewards.scoring import Scorer
    from flowgrpo_jax.runtime import stopping

    names = [f"benchmarks.bad_rewards.{one}" for one in (name, "calm")]
    rng, folder, right = np.random.default_rng(0), os.getcwd(), 0
    stopping.install()
    with stopping.GracefulStop():
        scorer = Scorer(combine(dict.fromkeys(names, 1.0)), deadline=60.0)
        for _ in range(tries):
            images = rng.random((16, 24, 24, 3), np.float32)
            prompts = [Prompt(str(n), {"include": [1]}, n) for n in range(16)]
            wanted, before = images.mean((1, 2, 3)), images.copy()
            scores = scorer(images, prompts)
            same = np.array_equal(images, before) and os.getcwd() == folder
            right += (
                same
                and np.allclose(scores[names[0]], wanted, rtol=1e-6)
                and np.allclose(scores[names[1]], wanted + 16, rtol=1e-6)
                and all(prompt.metadata == {"include": [1]} for prompt in prompts)
            )
    print(json.dumps({"right": right}), file=sys.stderr, flush=True)
    stopping.finish(0)


def rows(tries: int, parallel: int) -> list[str]:
    made = []

    def add(*cells: object) -> None:
        made.append("| " + " | ".join(map(str, cells)) + " |")
        print(made[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in SUCCEEDING:
            arguments = ["-m", "benchmarks.bad_rewards", f"--calls={name}"]
            lines, end, code = watched(
                [sys.executable, *arguments, f"--tries={tries}"], {}
            )
            told = [(at, line) for at, line in lines if line.startswith('{"right"')]
            right = json.loads(told[0][1])["right"] if told and code == 0 else 0
            if right < tries:
                print(*(line for _, line in lines), sep="\n")
            waited = end - told[0][0] if told else float("inf")
            add(name, "calls", tries, right, f"{waited:.1f}")
        for name in FAILING:
            with ThreadPoolExecutor(parallel) as several:
                one = functools.partial(command, name, folder=Path(folder))
                seen = list(several.map(one, range(tries)))
            slowest = max(seconds for _, seconds in seen)
            right = sum(fine for fine, _ in seen)
            add(name, "commands", tries, right, f"{slowest:.1f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=4, help="commands at once")
    parser.add_argument("--calls", choices=SUCCEEDING, help="one kind, in this process")
    flags = parser.parse_args()
    if flags.calls:
        calls(flags.calls, flags.tries)
    print(HEAD)
    table = "\n".join([HEAD, *rows(flags.tries, flags.parallel)])
    if flags.tries >= 60:
        told = f"--tries={flags.tries} --parallel={flags.parallel}"
        sections.write("Bad rewards", f"python -m benchmarks.bad_rewards {told}", table)


if __name__ == "__main__":
    main()

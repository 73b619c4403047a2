"""The page of a run, at any moment: while it goes on, after a kill, after its end.

python -m flowgrpo_jax.report --workdir=DIR                    writes DIR/report.html
python -m flowgrpo_jax.report --workdir=DIR --workdir=DIR2     several on one page
python -m flowgrpo_jax.report --workdir=DIR --watch            serves it, always new

One HTML file that loads nothing: verdicts in words, scores, curves, pictures.
"""

import os
from pathlib import Path

from absl import flags

from flowgrpo_jax import cli
from flowgrpo_jax.errors import UserError

FLAGS = flags.FlagValues()
_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", [], "Folder of a run; may be given several times.", FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "HTML file to write; by default report.html in the workdir, or runs.html in the "
    "folder that holds several.",
    FLAGS,
)
_WATCH = flags.DEFINE_bool(
    "watch", False, "Serve the page on this machine, always as new as the run.", FLAGS
)
_PORT = flags.DEFINE_integer(
    "port", 8265, "Where to serve it; 0 takes any free one.", 0, 65535, FLAGS
)


def main() -> None:
    from flowgrpo_jax.report import page, serve
    from flowgrpo_jax.runtime.workdir import atomic_write, locate

    if not _WORKDIRS.value:
        raise UserError("--workdir: missing: give the folder of a run")
    workdirs = list(dict.fromkeys(map(locate, _WORKDIRS.value)))
    output = _output(workdirs, page.FILE)
    written = page.render_page(workdirs, output.parent)  # first: are they there?
    cli.writable_folder(output.parent, "--output")
    atomic_write(output, written)
    print(output, flush=True)
    if _WATCH.value:
        with serve.Server(workdirs, _PORT.value) as server:
            print(f"{server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()


def _output(workdirs: list[Path], file: str) -> Path:
    if _OUTPUT.value:
        return Path(_OUTPUT.value).absolute()
    if len(workdirs) == 1:
        return workdirs[0] / file
    return Path(os.path.commonpath(workdirs)) / "runs.html"


if __name__ == "__main__":
    cli.run(main, FLAGS, computes=False)

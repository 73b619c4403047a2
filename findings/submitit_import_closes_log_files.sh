#!/usr/bin/env bash
# submitit 1.5.4: importing it closes every logging handler that the process has by then
# (it configures logging by a dictionary, which shuts the others down). A log file that was
# opened with mode "w" stays silent from there on, without an error: logging opens closed
# files again only if they were opened for appending.
# Matters for: trainers and launchers that log before they ask for SLURM. Guessed: an
# import changes no logger but its own. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "submitit==1.5.4" "cloudpickle==3.1.1"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging

files = {mode: logging.FileHandler(f"{mode}.log", mode=mode) for mode in "wa"}
log = logging.getLogger("trainer")
log.setLevel("INFO")
for handler in files.values():
    log.addHandler(handler)
log.info("before")
import submitit

log.info("after")
told = {mode: open(f"{mode}.log").read().split() for mode in files}
print(f"submitit {submitit.__version__}: {told}")
assert log.handlers == list(files.values())  # they are still there
assert told == {"w": ["before"], "a": ["before", "after"]}
PY

"""Sweeps: many runs from one description, on any machine; nothing of a run is here.

hyper.py       product, zipit, chainit, sweep, fixed: what a sweep is made of
units.py       from a sweep to its units: what each is called and started with
checks.py      every unit, looked at before anything starts
topologies.py  chips by the names of `estimate`, and what others call them
sweep_dir.py   ROOT/XID: what was launched there
unit.py        what a back end starts: one unit, its log, and how it ended
beside.py      a reward server that runs beside the units, until they have ended
states.py      how far each unit is, read from its workdir alone
live.py        the table that a launcher shows while it waits
results.py table.py page.py    what came of it: text and one page
command.py slots.py remote.py  what back ends share: flags, devices, other machines
local.py xm.py slurm.py tpu_vm.py gke.py sky.py    the back ends
sweeps/        ready sweeps
"""

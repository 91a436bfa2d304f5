"""Packaging of apo_kernels (the backend), apo (the front ends) and benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "apo_kernels" / "__init__.py").read_text())
assert VERSION is not None

BENCH = ["pytest>=8", "pytest-benchmark>=5", "rich>=13", "matplotlib>=3.8", "scikit-learn>=1.4"]
TRANSLATION = ["sacrebleu>=2.4"]
INTEGRATIONS = ["lightning>=2.5", "torchmetrics>=1.5", "transformers>=5.0", "accelerate>=1.10"]
TEST = [*BENCH, *TRANSLATION, *INTEGRATIONS, "hypothesis>=6.100", "lion-pytorch>=0.2", "torch-optimi>=0.3"]
DEV = [*TEST, "ruff>=0.6", "mypy>=1.11"]

setup(
    name="apo-kernels",
    version=VERSION.group(1),
    description="Amortized Proximal Optimization on fused kernels: second-order steps without a matrix inverse",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["apo_kernels", "apo_kernels.*", "apo", "apo.*", "benchmarks", "benchmarks.*"]),
    package_data={"apo_kernels": ["py.typed"], "apo": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "bench": BENCH,
        "translation": TRANSLATION,
        "integrations": INTEGRATIONS,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

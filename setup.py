"""Packaging: apo_kernels (the backend) and apo (the optimizers). ``benchmarks`` runs from a checkout."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "apo_kernels" / "__init__.py").read_text())
assert VERSION is not None

TRITON = ["triton>=3.6; platform_system == 'Linux'"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", "rich>=13", "matplotlib>=3.8", "scikit-learn>=1.4"]
TRANSLATION = ["sacrebleu>=2.4"]
INTEGRATIONS = ["lightning>=2.5", "torchmetrics>=1.5", "transformers>=5.0", "accelerate>=1.10"]
PEERS = ["pytorch_optimizer>=3.10", "schedulefree>=1.4"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
TEST = [
    *BENCH,
    *TRANSLATION,
    *TRITON,
    *INTEGRATIONS,
    *PEERS,
    "hypothesis>=6.100",
    "pytest-xdist>=3.6",
    "lion-pytorch>=0.2",
    "torch-optimi>=0.3",
]
DEV = [*TEST, *DOCS, "ruff>=0.6", "mypy>=1.11", "build>=1.2", "twine>=6"]

setup(
    name="apo-kernels",
    version=VERSION.group(1),
    description="Optimizers that learn their own learning rate or preconditioner, on fused kernels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["apo_kernels", "apo_kernels.*", "apo", "apo.*"]),
    package_data={"apo_kernels": ["py.typed"], "apo": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "numpy>=1.26"],
    # torch's builds for GPUs bring Triton; without it everything runs on torch's own products.
    extras_require={
        "triton": TRITON,
        "bench": BENCH,
        "translation": TRANSLATION,
        "integrations": INTEGRATIONS,
        "peers": PEERS,
        "docs": DOCS,
        "test": TEST,
        "dev": DEV,
    },
    keywords=["pytorch", "optimizer", "learning rate", "preconditioner", "second-order", "triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

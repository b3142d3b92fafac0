"""Packaging of MegaDS. The tested versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megads",
    version="0.1.0",
    description="DeepSeek-V3-style pretraining (MLA + MoE + MTP) on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megads", "megads.*"]),
    package_data={"megads.report": ["*.css", "*.html", "*.js"]},
    py_modules=["pretrain_megads"],
    install_requires=[
        "torch>=2.11",
        "megatron-core==0.19.2",
        "einops",  # megatron-core's Megatron-FSDP needs it and does not say so
        "psutil",  # megatron-core's checkpointing needs it and does not say so
        "numpy",
        "pydantic>=2",
        "sentencepiece",
        "tokenizers",
        "gigatoken",
        "safetensors",
        "orjson",
        "msgspec",
        "jinja2",
        "isal",
        "zstandard",
        "fsspec",
        "rich",
        "packaging",
        "tensorboard",
        "matplotlib",
        "plotly",
    ],
    extras_require={
        # apex is NVIDIA's and not on the package index (the apex there is an unrelated web toolkit);
        # Megatron-Core uses it when it is installed.
        "gpu": ["transformer-engine[pytorch]==2.20.*"],
        "quantize": ["nvidia-modelopt[torch]"],
        "s3": ["s3fs"],
        "wandb": ["wandb"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "transformers>=5",
            "wandb",
            "s3fs",
            "moto[s3]",
            "flask",
            "flask-cors",  # an S3 server to test against
        ],
    },
)

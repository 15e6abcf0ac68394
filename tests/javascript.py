"""Packages of npm for the tests of the page and of the Node example, in a cache outside the repository."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PACKAGES = ("onnxruntime-web@1.30.0", "@huggingface/transformers@4.3.1")
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vit_simple" / "-".join(PACKAGES).replace("/", "_")
)


def node_modules() -> Path:
    """The folder node_modules with the packages; the test is skipped where they cannot be had."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs Node: apt-get install nodejs npm")
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as work:
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", work, *PACKAGES]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip(f"needs packages of npm, which cannot be installed: {' '.join(command)}")
            Path(work).rename(CACHE)
            Path(work).mkdir()  # for the end of the context
    return CACHE / "node_modules"

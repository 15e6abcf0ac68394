"""The soak test itself runs: one round, without waiting for time to pass."""

import subprocess
import sys

import pytest

from vit_simple.files import ROOT


@pytest.mark.slow
def test_soak_of_one_round_has_no_violation():
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0", "--seed", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "soak, seed 3: " in result.stdout and "1 rounds, " in result.stdout
    assert result.stdout.endswith(" 0 violations\n")

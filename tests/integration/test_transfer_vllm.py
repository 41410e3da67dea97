"""The installed vLLM's own classes, as far as they run without a GPU, take what the transfers send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "meet_vllm.py"


@pytest.mark.vllm
@pytest.mark.slow
def test_the_installed_vllm_meets_us_takes_our_bodies_and_unpacks_our_buffers() -> None:
    pytest.importorskip("vllm")
    environment = os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]

"""What a run was computed with: versions, devices, the commit."""

import os
import pathlib
import platform
import subprocess
from typing import Any

import flax
import jax
import numpy as np
import optax

import jaxrd


def environment() -> dict[str, Any]:
    """Returns versions, devices and the git commit, as a run records them."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10,
            cwd=pathlib.Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "jaxrd": jaxrd.__version__, "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()], "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS") or None, "git_commit": commit or None,
    }

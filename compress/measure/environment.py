"""What numbers depend on besides the model: versions, and the machine."""

from __future__ import annotations

import platform
import time

import numpy as np
import torch


def environment() -> dict[str, str]:
    """Versions of compress, torch, numpy and Python, the platform, and the date, by name."""
    from compress import __version__  # which imports this

    return {
        "compress": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
    }

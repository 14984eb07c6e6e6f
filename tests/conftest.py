"""What every test shares: the profile of property tests, and the GPU tests' reason to skip."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A proof kept on disk by an earlier run would hide a mistake of this one.
os.environ["EINSUMCASCADE_CACHE"] = ""

# One profile everywhere: the examples are the same on every machine, so a failure repeats where it is looked into.
settings.register_profile(
    "einsumcascade",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.load_profile("einsumcascade")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where PyTorch sees no GPU, and say so."""
    if torch.cuda.is_available():
        return
    build = f"PyTorch {torch.__version__}"
    reason = (
        f"{build} is built for CPUs"
        if torch.version.cuda is None
        else f"{build} for CUDA {torch.version.cuda} finds {torch.cuda.device_count()} GPUs"
    )
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))

"""Fixtures for the tests of a layer's cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inputs import Inputs, make_inputs


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh floating-point memory with NaN, so that a read of unwritten memory shows in the output."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        fresh = new_empty(self, *size, **options)
        if fresh.is_floating_point():
            return fresh.fill_(torch.nan)
        return fresh.fill_(0x5D if fresh.dtype.itemsize == 1 else 1 << 20)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def x(seeded: torch.Generator) -> Inputs:
    return make_inputs(seeded, 2, 4, 2, 260, 16)

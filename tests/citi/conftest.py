"""Fixtures that several of these tests use."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def all_in_fp64(monkeypatch):
    """transformers' norms, rotary embeddings and losses would round fp64 values to fp32."""
    plain_to, plain_float = torch.Tensor.to, torch.Tensor.float

    def to(self, *args, **kwargs):
        stays = self.dtype == torch.float64 and args == (torch.float32,) and not kwargs
        return self if stays else plain_to(self, *args, **kwargs)

    def to_float(self):
        return self if self.dtype == torch.float64 else plain_float(self)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", to_float)

"""Tensors of these tests are made on the device under test (see under_test.py)."""

from __future__ import annotations

import torch

import under_test

if under_test.DEVICE != "cpu":
    torch.set_default_device(under_test.DEVICE)

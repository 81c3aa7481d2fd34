"""Imports that the processes of ``forked`` share; nothing here may start a thread."""

from __future__ import annotations

import safetensors.torch
import torch
import torch.distributed

import distmuon
import distmuon.checkpoint
import distmuon.dist_muon
import distmuon.muon
import tests.checkpoint.scene

__all__ = ["distmuon", "safetensors", "tests", "torch"]

"""Checkpoints that load at any number of ranks and under any placement, bit for bit; nothing in them is pickled."""

from __future__ import annotations

from distmuon.checkpoint.load import Restored, load
from distmuon.checkpoint.save import Saver, save
from distmuon.checkpoint.verify import Contents, export, verify

__all__ = ["Contents", "Restored", "Saver", "export", "load", "save", "verify"]

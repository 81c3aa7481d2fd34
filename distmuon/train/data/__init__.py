"""Real text to memory-mapped tokens: sources, tokenizers, a verified cache and a resumable data order."""

from __future__ import annotations

from distmuon.train.data.batches import SequenceOrder, gather, validation_ids
from distmuon.train.data.config import DataConfig
from distmuon.train.data.prepare import prepare
from distmuon.train.data.store import TokenData

__all__ = ["DataConfig", "SequenceOrder", "TokenData", "gather", "prepare", "validation_ids"]

"""The base of every configuration model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

DTypeName = Literal["float32", "bfloat16", "float16"]


class Strict(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

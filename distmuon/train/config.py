"""Configuration of a training run: the tables of a run file, with every range and default."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from distmuon.config import Rate, parse, printable
from distmuon.errors import ConfigError
from distmuon.ns_settings import NewtonSchulz
from distmuon.strict import Strict
from distmuon.train.data.config import DataConfig


class ModelConfig(Strict):
    """Shape of the mixture-of-experts transformer."""

    width: int = Field(default=128, ge=2)
    """Width of the residual stream; a multiple of heads."""
    layers: int = Field(default=4, ge=1)
    """Number of blocks."""
    heads: int = Field(default=4, ge=1)
    """Number of query heads; a multiple of kv_heads."""
    kv_heads: int = Field(default=2, ge=1)
    """Number of key and value heads."""
    experts: int = Field(default=8, ge=1)
    """Experts per block; a multiple of ep_size."""
    top_k: int = Field(default=2, ge=1)
    """Experts per token, at most experts."""
    expert_hidden: int = Field(default=256, ge=1)
    """Hidden width of an expert."""
    expert: Literal["swiglu", "silu"] = "swiglu"
    """"swiglu" has a gate, up and down matrix, "silu" an up and down matrix."""
    context: int = Field(default=256, ge=2)
    """Positions per sequence."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Whether the embedding is also the LM head."""
    aux_loss_weight: Rate = 0.01
    """Weight of the load-balancing loss."""
    ep_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of a block; must divide the number of ranks."""

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        for whole, part in (("width", "heads"), ("heads", "kv_heads"), ("experts", "ep_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} = {getattr(self, whole)} is not a multiple of {part} = {getattr(self, part)}"
                )
        if self.width // self.heads % 2:
            raise ValueError(f"width / heads = {self.width // self.heads} must be even for rotary positions")
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} is more than experts = {self.experts}")
        return self


class OptimizerConfig(Strict):
    """Optimizer and learning rates; each kind of parameter has a rate of its own."""

    name: Literal["distmuon", "adamw", "deepspeed-adamw"] = "distmuon"
    """"adamw" is AdamW on DistMuon's ZeRO-1 path, "deepspeed-adamw" is DeepSpeed's AdamW with ZeRO-1."""
    lr: Rate = 8e-3
    """Peak learning rate of hidden matrices and gains."""
    embedding_lr: Rate = 1.6e-2
    """Peak learning rate of the embedding and the LM head."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay of matrices and embeddings; gains have none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    nesterov: bool = True
    """Whether Muon looks ahead by one momentum step."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay rate of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator floor."""
    gradient_clipping: Rate = 1.0
    """Largest global norm of the raw gradients; 0 does not clip."""
    router: Literal["muon", "adamw"] = "muon"
    """Rule for the experts' routers."""
    policy: Literal["balanced", "flat", "team"] = "balanced"
    """Placement: whole matrices, ZeRO-1's equal contiguous shards, or teams that share large matrices."""
    transport: Literal["auto", "scatter", "owner"] = "auto"
    """Equal shards in every bucket, unequal ones in smaller buckets, or the faster of both."""
    bucket_mb: float | None = Field(default=None, gt=0, le=1e6)
    """Least size of a reduce-scatter in MB; None means 25, or 10^6 elements a rank if that is more."""
    overlap_forward: bool = False
    """Whether parameters are gathered while the next forward begins."""
    ns: NewtonSchulz = NewtonSchulz()
    """Newton-Schulz settings."""


class ScheduleConfig(Strict):
    """Length of the run and learning-rate schedule, in optimizer updates."""

    updates: int = Field(default=500, ge=1)
    """Optimizer updates."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the updates with linear warm-up; cosine decay follows."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end as a share of the peak."""


class BatchConfig(Strict):
    """Sequences per update and per forward pass."""

    sequences: int = Field(default=16, ge=1)
    """Sequences per update over all ranks; a multiple of ranks x micro_sequences."""
    micro_sequences: int = Field(default=4, ge=1)
    """Sequences per rank and forward pass."""


class PrecisionConfig(Strict):
    """Number formats."""

    parameters: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" keeps float32 master weights in the optimizer."""
    autocast: Literal["off", "bfloat16"] = "bfloat16"
    """Precision of the model's matrix products."""
    matmul: Literal["highest", "high", "medium"] = "medium"
    """torch.set_float32_matmul_precision."""


class EvaluationConfig(Strict):
    """Held-out loss, always on the same sequences."""

    every: int = Field(default=50, ge=1)
    """Updates between evaluations."""
    sequences: int = Field(default=256, ge=1)
    """Sequences of every evaluation, also the last."""


class CheckpointConfig(Strict):
    """Checkpoints; one is always written at the end."""

    every: int = Field(default=250, ge=1)
    """Updates between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    background: bool = True
    """Whether they are written while training goes on, from a copy of the state on the host."""


class RunConfig(Strict):
    """Everything a run depends on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory."""
    out: str = "runs"
    """Directory of all runs."""
    resume: Literal["never", "auto"] = "never"
    """"auto" continues the run of this name from its newest checkpoint, if it has been started."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of weights and data order."""
    timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """Seconds after which a rank that waits for another one ends with an error."""
    watchdog_s: float = Field(default=120.0, gt=0, le=86400)
    """Seconds, or twice the median step if longer, after which a rank without progress writes down where it stands."""
    trace: bool = False
    """Whether to write a timeline of some updates as trace.json, for chrome://tracing and Perfetto."""
    trace_steps: int = Field(default=3, ge=1)
    """Updates in the timeline, from the second of this start on."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    precision: PrecisionConfig = PrecisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return Path(self.out) / self.name

    def accumulation(self, world: int) -> int:
        """Micro-batches per update.

        Args:
            world: number of ranks.

        Returns:
            sequences / (world * micro_sequences).

        Raises:
            ConfigError: that is not a whole number, or ep_size does not divide the ranks.
        """
        share = world * self.batch.micro_sequences
        if self.batch.sequences % share:
            raise ConfigError(
                f"batch.sequences = {self.batch.sequences} is not a multiple of {world} ranks x "
                f"batch.micro_sequences = {self.batch.micro_sequences}; change one of them."
            )
        if world % self.model.ep_size:
            raise ConfigError(
                f"model.ep_size = {self.model.ep_size} does not divide the {world} ranks; "
                f"use a divisor of {world}, or start another number of ranks."
            )
        return self.batch.sequences // share


def load_run(path: Path) -> RunConfig:
    """Read a run file; its key ``model`` may be a table or the path of a model file, relative to the run file.

    Args:
        path: a TOML file.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: a file is missing, not TOML, or holds an illegal setting.
    """
    table = read_toml(path)
    if isinstance(table.get("model"), str):
        table["model"] = read_toml(path.parent / table["model"])
    return parse(RunConfig, table, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.

    Returns:
        Its tables.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    shown = printable(str(path), 400)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folders = "configs/runs, configs/models and configs/machines"
        raise ConfigError(f"{shown} does not exist; look in {folders}.") from None
    except RecursionError:
        raise ConfigError(f"{shown} cannot be read as TOML: its lists or tables are nested too deeply.") from None
    except (OSError, ValueError) as error:
        # Besides bytes that are no text and text that is no TOML: a number of thousands of digits.
        raise ConfigError(f"{shown} cannot be read as TOML: {printable(str(error), 200)}.") from None

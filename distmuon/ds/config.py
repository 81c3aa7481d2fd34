"""What a DeepSpeed configuration asks of DistMuon, and a refusal of what it cannot give."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch

from distmuon.config import PlacementSettings, parse
from distmuon.errors import ConfigError

log = logging.getLogger(__name__)

NAME = "DistMuon"

_ELSEWHERE = {
    "max_grad_norm": "gradient_clipping",
    "reduce_dtype": "communication_data_type",
    "grad_accum_dtype": 'data_types: {"grad_accum_dtype": ...}',
}
# Settings of stock ZeRO-1 that stay without effect: DistMuon has its own buckets and always overlaps.
_WITHOUT_EFFECT = {
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
}


class JsonParams(PlacementSettings):
    """The ``optimizer.params`` table."""

    router: Literal["muon", "adamw"] = "muon"
    """Rule for the gates of mixture-of-experts layers; the papers use Muon."""
    splits: dict[str, int | list[int]] = {}
    """Patterns of parameters that are several matrices on top of each other: their number, or the rows of each."""
    overlap_forward: bool = False
    """Whether all-gathers go on while the next forward begins."""


def is_distmuon(name: object) -> bool:
    """Whether an optimizer name is ours, in any case.

    Args:
        name: what the configuration says.

    Returns:
        True for "DistMuon", "distmuon", ...
    """
    return isinstance(name, str) and name.lower() == NAME.lower()


def normalize(config: Mapping[str, Any]) -> dict[str, Any]:
    """Expand the short form ``"optimizer": "DistMuon"``.

    Args:
        config: a DeepSpeed configuration. Not written to.

    Returns:
        The configuration with ``{"type": "DistMuon"}`` in place of the string; a shallow copy.
    """
    short = config.get("optimizer")
    return {**config, "optimizer": {"type": short}} if is_distmuon(short) else dict(config)


def read_params(engine: Any) -> tuple[dict[str, Any], JsonParams]:
    """Check the ``optimizer.params`` table and add what DeepSpeed keeps elsewhere.

    Args:
        engine: the DeepSpeedEngine under construction.

    Returns:
        Keyword arguments for DistMuon, and the table.

    Raises:
        ConfigError: a key is unknown, out of range, or belongs elsewhere in the configuration.
    """
    table = dict(engine.optimizer_params() or {})
    for key, place in _ELSEWHERE.items():
        if key in table:
            raise ConfigError(f'optimizer.params: "{key}" is set by the DeepSpeed key {place}; move it there.')
    params = parse(JsonParams, table, "optimizer.params")
    model_dtype, accumulation = engine.get_data_types()
    values = {name: getattr(params, name) for name in PlacementSettings.model_fields}
    values["reduce_dtype"] = engine.communication_data_type
    values["grad_accum_dtype"] = accumulation if accumulation != model_dtype else None
    return values, params


def check_engine(engine: Any) -> None:
    """Refuse every setting that DistMuon cannot honour.

    Args:
        engine: the DeepSpeedEngine under construction.

    Raises:
        ConfigError: one sentence that names the setting and what to change.
    """
    for found, what, remedy in _refusals(engine):
        if found:
            raise ConfigError(f"DistMuon does not support {what}; {remedy}.")
    zero = engine._config.zero_config
    ignored = sorted(_WITHOUT_EFFECT & set(getattr(zero, "model_fields_set", ())))
    if ignored:
        log.warning(
            "zero_optimization keys without effect under DistMuon: %s; optimizer.params.bucket_mb sizes its buckets",
            ", ".join(ignored),
        )


def _refusals(engine: Any) -> list[tuple[bool, str, str]]:
    """Whether each unsupported setting is on, what it is called, and what to do about it."""
    stage = int(engine.zero_optimization_stage())
    config, zero, clip = engine._config, engine._config.zero_config, engine.gradient_clipping()
    offloads = [getattr(zero, key, None) for key in ("offload_optimizer", "offload_param")]
    devices = [str(getattr(offload.device, "value", offload.device)) for offload in offloads if offload is not None]
    comm_dtypes = (torch.float32, torch.bfloat16)
    return [
        (stage != 1, f"zero_optimization.stage = {stage}", "it shards as stage 1 does, so set it to 1"),
        (engine.fp16_enabled(), "fp16.enabled", 'set "bf16": {"enabled": true} instead'),
        (any(device != "none" for device in devices), "zero_optimization.offload_*", "remove it"),
        (engine.pipeline_parallelism, "a PipelineModule", "pass a plain nn.Module"),
        (bool(getattr(engine, "zenflow", False)), "zero_optimization.zenflow", "remove it"),
        (engine.load_universal_checkpoint(), "checkpoint.load_universal", "set it to false"),
        (not engine.postscale_gradients(), "prescale_gradients", "set it to false"),
        (engine.gradient_predivide_factor() != 1.0, "gradient_predivide_factor", "set it to 1.0"),
        (not getattr(engine, "gradient_average", True), 'gradient_allreduce_op "sum"', 'set it to "avg"'),
        (engine.sequence_parallel_size != 1, "sequence parallelism", "use data and expert parallelism only"),
        (_model_parallel(engine), "tensor parallelism", "use data and expert parallelism only"),
        (
            getattr(config.bfloat16_config, "bf16_optimizer_states", False),
            "bf16_optimizer_states",
            "set it to false",
        ),
        (
            getattr(config.bfloat16_config, "bf16_master_weights_and_grads", False),
            "bf16_master_weights_and_grads",
            "set it to false",
        ),
        (
            engine.communication_data_type not in comm_dtypes,
            "communication_data_type",
            'set it to "fp32" or "bf16"',
        ),
        (
            bool(getattr(zero, "zero_quantized_gradients", False)),
            "zero_quantized_gradients",
            "set it to false",
        ),
        (bool(getattr(zero, "zero_quantized_weights", False)), "zero_quantized_weights", "set it to false"),
        (getattr(zero, "zero_hpz_partition_size", 1) != 1, "zero_hpz_partition_size", "set it to 1"),
        (engine.use_node_local_storage(), "checkpoint.use_node_local_storage", "use a directory all nodes share"),
        (bool(zero.elastic_checkpoint), "zero_optimization.elastic_checkpoint", "set it to false"),
        (bool(config.disable_allgather), "disable_allgather", "set it to false"),
        (clip < 0, f"gradient_clipping = {clip}", "set it to 0, which does not clip, or above"),
        (bool(engine.is_deepcompile_enabled()), "compile.deepcompile", "set it to false"),
        (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
            "torch_autocast.dtype float16",
            'set it to "bfloat16"',
        ),
    ]


def _model_parallel(engine: Any) -> bool:
    if engine.autotp_size() > 1:
        return True
    return engine.mpu is not None and engine.mpu.get_model_parallel_world_size() > 1

"""``engine.save_checkpoint`` and ``engine.load_checkpoint`` on top of ``distmuon.checkpoint``."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distmuon import checkpoint
from distmuon.checkpoint.directory import latest
from distmuon.comm import Group
from distmuon.errors import CheckpointError, StateError

log = logging.getLogger(__name__)

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# How a mapping is written whose keys are not text, which JSON does not have.
_PAIRS = "__pairs__"
# How a number is written that is not finite: the best loss so far, before there is one.
_NUMBER = "__number__"


def save_checkpoint(
    engine: Any,
    save_dir: str,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Save an engine's model, optimizer, schedule and counters; every rank calls it.

    Args:
        engine: a DeepSpeedEngine with a ZeroDistMuon.
        save_dir: directory of all checkpoints.
        tag: name of the checkpoint; None means ``step_%08d`` of the engine's steps.
        client_state: what else to keep, as JSON values.
        save_latest: whether it is loaded by default.
        exclude_frozen_parameters: whether to leave frozen parameters out.

    Returns:
        True.

    Raises:
        CheckpointError: it could not be saved; raised on every rank, and the checkpoint before stays the latest.
    """
    checkpoint.save(
        save_dir,
        engine.module,
        engine.optimizer,
        engine.global_steps,
        engine_state(engine, client_state or {}),
        name=None if tag is None else str(tag),
        rename=expert_names(engine.module),
        point=save_latest,
        frozen=not exclude_frozen_parameters,
        replace=True,
    )
    return True


def load_checkpoint(
    engine: Any,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: object = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load what ``save_checkpoint`` saved, at any number of ranks and any ``ep_size``; every rank calls it.

    Args:
        engine: a DeepSpeedEngine with a ZeroDistMuon.
        load_dir: directory of all checkpoints.
        tag: name of the checkpoint; None takes the latest.
        load_module_strict: whether model and checkpoint must have the same tensors.
        load_optimizer_states: whether to load the optimizer's state.
        load_lr_scheduler_states: whether to load the schedule.
        load_module_only: whether to load the model and nothing else.
        custom_load_fn: not supported; must be None.

    Returns:
        Path of the checkpoint and the client state; (None, None) if the directory has no checkpoint and no tag is
        given.

    Raises:
        CheckpointError: the checkpoint is not whole, or not one of DistMuon's.
        StateError: it does not fit model or optimizer. Nothing is changed then.
    """
    if custom_load_fn is not None:
        raise CheckpointError("custom_load_fn is not supported with DistMuon; load into the module yourself.")
    if tag is None and not _has_any(Path(load_dir), engine.optimizer.group):
        return None, None
    with_state = load_optimizer_states and not load_module_only

    def accept(extra: Mapping[str, Any]) -> None:
        _check_extra(extra, engine.lr_scheduler if with_schedule else None)

    with_schedule = load_lr_scheduler_states and not load_module_only
    restored = checkpoint.load(
        load_dir,
        engine.module,
        engine.optimizer if with_state else None,
        name=None if tag is None else str(tag),
        rename=expert_names(engine.module),
        strict=load_module_strict,
        rng=with_state,
        accept=accept,
    )
    own = restored.extra["deepspeed"]
    if not with_state or not engine.zero_load_from_fp32_weights():
        engine.optimizer.refresh_fp32_params()
    if not load_module_only:
        if with_schedule and engine.lr_scheduler is not None and own["lr_scheduler"] is not None:
            _load_schedule(engine.lr_scheduler, own["lr_scheduler"])
        for counter in _COUNTERS:
            setattr(engine, counter, own[counter])
    return str(restored.path), dict(restored.extra["client"])


def _has_any(directory: Path, group: Group) -> bool:
    """Whether a directory has checkpoints, which all ranks must see; DeepSpeed's own are refused."""
    own = latest(directory) is not None
    seen = group.all_gather_text(str(own))
    if len(set(seen)) > 1:
        blind = [rank for rank, answer in zip(group.ranks, seen, strict=True) if answer == "False"]
        raise CheckpointError(f"ranks {blind} see no checkpoint in {directory}; use a directory that all nodes share.")
    if own:
        return True
    if (directory / "latest").exists():
        raise CheckpointError(f"{directory} has checkpoints that were not saved by DistMuon, which it does not open.")
    log.warning("%s has no checkpoint; nothing is loaded", directory)
    return False


def engine_state(engine: Any, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """What of an engine is neither model nor optimizer.

    Args:
        engine: a DeepSpeedEngine with a ZeroDistMuon.
        client_state: the caller's own.

    Returns:
        JSON values, the ``extra`` of the checkpoint.

    Raises:
        CheckpointError: the engine has state that is not kept.
    """
    for used, what in (
        (engine.curriculum_learning_enabled(), "curriculum learning"),
        (engine.random_ltd_enabled(), "random layer token drop"),
    ):
        if used:
            raise CheckpointError(f"the state of {what} is not kept in DistMuon's checkpoints; switch it off.")
    schedule = None if engine.lr_scheduler is None else _encode(dict(engine.lr_scheduler.state_dict()))
    own = {**{counter: int(getattr(engine, counter)) for counter in _COUNTERS}, "lr_scheduler": schedule}
    return {"deepspeed": own, "client": dict(client_state)}


def expert_names(module: nn.Module) -> dict[str, str]:
    """Names that count experts over all ranks, where each rank's ``deepspeed.moe`` layers count their own from zero.

    Args:
        module: the engine's module.

    Returns:
        From the names of expert parameters and buffers to global ones.

    Raises:
        CheckpointError: there are experts that are not in a ``deepspeed.moe`` layer, and ranks with different ones.
    """
    from deepspeed.moe.experts import Experts
    from deepspeed.utils import groups

    found: dict[str, str] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, Experts):
            continue
        for number, expert in enumerate(layer.deepspeed_experts):
            group = next((getattr(parameter, "group_name", None) for parameter in expert.parameters()), None)
            first = 0 if group is None else groups._get_expert_parallel_rank(group) * len(layer.deepspeed_experts)
            prefix = f"{path}.deepspeed_experts" if path else "deepspeed_experts"
            for name in expert.state_dict():
                found[f"{prefix}.{number}.{name}"] = f"{prefix}.{first + number}.{name}"
    for name, parameter in module.named_parameters():
        group = None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name", None)
        if group and name not in found and groups._get_expert_parallel_world_size(group) > 1:
            raise CheckpointError(f'"{name}" is an expert outside of a deepspeed.moe layer and cannot be named.')
    return found


def _check_extra(extra: Mapping[str, Any], scheduler: Any) -> None:
    """Make sure, before anything is loaded, that an engine saved the checkpoint and that the schedule fits."""
    own = extra.get("deepspeed")
    if not isinstance(own, Mapping) or not isinstance(extra.get("client"), Mapping) or not {*_COUNTERS} <= own.keys():
        raise StateError("the checkpoint was not saved by a DeepSpeed engine; use distmuon.checkpoint.load.")
    saved = own.get("lr_scheduler")
    if scheduler is not None and saved is not None:
        given, needed = sorted(_decode(saved)), sorted(scheduler.state_dict())
        if given != needed:
            raise StateError(
                f"the checkpoint has the state {given} of a schedule and {type(scheduler).__name__} needs {needed}; "
                "build the schedule that was saved, or load with load_lr_scheduler_states=False."
            )


def _load_schedule(scheduler: Any, saved: Any) -> None:
    """Load a schedule, in the types that it has: torch's milestones are a Counter."""
    state = _decode(saved)
    for key, value in state.items():
        if isinstance(getattr(scheduler, key, None), Counter):
            state[key] = Counter(value)
    scheduler.load_state_dict(state)


def _encode(value: Any) -> Any:
    """JSON values for a schedule's state."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: repr(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(inner) for key, inner in value.items()}
        return {_PAIRS: [[key, _encode(inner)] for key, inner in value.items()]}
    return [_encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {_NUMBER}:
            return float(value[_NUMBER])
        if value.keys() == {_PAIRS}:
            return {key: _decode(inner) for key, inner in value[_PAIRS]}
        return {key: _decode(inner) for key, inner in value.items()}
    return [_decode(inner) for inner in value] if isinstance(value, list) else value

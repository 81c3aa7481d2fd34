"""Makes ``"optimizer": "DistMuon"`` known to DeepSpeed.

DeepSpeed has no plug-in mechanism, so seven methods are wrapped; each wrapper passes everything that is not DistMuon on
to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wrapt import wrap_function_wrapper

from distmuon.dist_muon import DistMuon
from distmuon.ds import config, groups
from distmuon.errors import ConfigError

_MARK = "_distmuon_registered"

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def register(deepspeed: Any) -> None:
    """Wrap the engine's methods, once.

    Args:
        deepspeed: the imported package.
    """
    engine_module, config_module = deepspeed.runtime.engine, deepspeed.runtime.config
    if getattr(engine_module, _MARK, False):
        return
    wrap_function_wrapper(config_module, "DeepSpeedConfig._initialize_params", _initialize_params)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine._is_supported_optimizer", _is_supported_optimizer)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine._configure_basic_optimizer", _configure_basic_optimizer)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine._do_optimizer_sanity_check", _do_optimizer_sanity_check)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine._configure_zero_optimizer", _configure_zero_optimizer)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine.save_checkpoint", _save_checkpoint)
    wrap_function_wrapper(engine_module, "DeepSpeedEngine.load_checkpoint", _load_checkpoint)
    setattr(engine_module, _MARK, True)


def _initialize_params(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    return wrapped(config.normalize(args[0] if args else kwargs["param_dict"]))


def _is_supported_optimizer(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    return config.is_distmuon(args[0]) or wrapped(*args, **kwargs)


def _configure_basic_optimizer(wrapped: Wrapped, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    if not config.is_distmuon(engine.optimizer_name()):
        return wrapped(*args, **kwargs)
    from distmuon.ds.optimizer import ZeroDistMuon

    config.check_engine(engine)
    settings, table = config.read_params(engine)
    (model_parameters,) = args
    param_groups = groups.to_param_groups(engine.module, model_parameters, table.router, table.splits)
    optimizer = ZeroDistMuon(engine, param_groups, **settings)
    if table.overlap_forward:
        optimizer.overlap_forward(engine.module)
    return optimizer


def _do_optimizer_sanity_check(wrapped: Wrapped, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    (optimizer,) = args
    if not isinstance(optimizer, DistMuon):
        return wrapped(*args, **kwargs)
    if not hasattr(optimizer, "dp_process_group"):
        raise ConfigError(
            "a DistMuon object cannot be given to deepspeed.initialize(optimizer=...), which needs one tied to its "
            'engine; leave it out and set "optimizer": {"type": "DistMuon", "params": {...}} in the configuration.'
        )
    return "zero_optimization"


def _configure_zero_optimizer(wrapped: Wrapped, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    optimizer = args[0] if args else kwargs["optimizer"]
    return optimizer if isinstance(optimizer, DistMuon) else wrapped(*args, **kwargs)


def _save_checkpoint(wrapped: Wrapped, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    if not isinstance(engine.optimizer, DistMuon):
        return wrapped(*args, **kwargs)
    from distmuon.ds.checkpoints import save_checkpoint

    return save_checkpoint(engine, *args, **kwargs)


def _load_checkpoint(wrapped: Wrapped, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    if not isinstance(engine.optimizer, DistMuon):
        return wrapped(*args, **kwargs)
    from distmuon.ds.checkpoints import load_checkpoint

    return load_checkpoint(engine, *args, **kwargs)

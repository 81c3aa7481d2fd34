"""Model files, for planning and for training, as lists of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distmuon.bricks import Kind, ParamSpec
from distmuon.config import parse
from distmuon.errors import ConfigError
from distmuon.planning.architecture import Architecture
from distmuon.planning.parameters import PlannedParam
from distmuon.train.config import ModelConfig, read_toml

# Training model files say with which vocabulary they have the number of parameters they name.
_VOCABULARY = re.compile(r"vocabulary of ([\d,]*\d)")


@dataclass(frozen=True)
class Model:
    """A model file that can be listed for any expert-parallel size."""

    name: str
    shape: Architecture | ModelConfig
    vocabulary: int
    router: Kind = "muon"

    @property
    def experts(self) -> int:
        """Experts of a block; 1 without."""
        if isinstance(self.shape, ModelConfig):
            return self.shape.experts
        return self.shape.moe.count if self.shape.moe else 1

    def default_ep(self, world: int) -> int:
        """Expert-parallel size that the file asks for, or the next smaller one that divides the ranks.

        Args:
            world: number of ranks.
        """
        asked = self.shape.ep_size if isinstance(self.shape, ModelConfig) else self.shape.ep
        return math.gcd(asked, world)

    def parameters(self, ep: int) -> list[PlannedParam]:
        """List the parameters that one rank has a copy of, in forward order.

        Args:
            ep: number of ranks that share the experts of a block.

        Returns:
            The parameters, and the product of a tied head.

        Raises:
            ConfigError: the experts cannot be divided so.
        """
        if ep > 1 and self.experts == 1:
            raise ConfigError(f"ep = {ep} needs experts, and {self.name} has none; leave it out.")
        if ep < 1 or self.experts % ep:
            legal = ", ".join(str(size) for size in range(1, self.experts + 1) if self.experts % size == 0)
            raise ConfigError(
                f"ep = {ep} does not divide the {self.experts} experts of {self.name}; use one of {legal}."
            )
        if isinstance(self.shape, ModelConfig):
            return list(_training_parameters(self.shape, self.vocabulary, ep, self.router))
        return list(self.shape.parameters(ep, self.router))


def load_model(path: Path, vocabulary: int | None = None, router: Kind = "muon") -> Model:
    """Read a model file; one with the key "vocabulary" is for planning, one without for training.

    Args:
        path: a TOML file.
        vocabulary: rows of the embedding; None takes the file's own.
        router: rule of the router matrices.

    Returns:
        The model.

    Raises:
        ConfigError: the file is missing, not TOML, holds an illegal setting, or has no vocabulary where none is given.
    """
    table = read_toml(path)
    if "vocabulary" in table:
        table["vocabulary"] = vocabulary or table["vocabulary"]
        shape = parse(Architecture, table, str(path))
        return Model(path.stem, shape, shape.vocabulary, router)
    config = parse(ModelConfig, table, str(path))
    named = _VOCABULARY.search(path.read_text(encoding="utf-8"))
    if vocabulary is None and named is not None:
        vocabulary = int(named.group(1).replace(",", ""))
    if vocabulary is None:
        raise ConfigError(f"{path} names no vocabulary; give one with --vocab, e.g. --vocab 4096.")
    return Model(path.stem, config, vocabulary, router)


def _training_parameters(config: ModelConfig, vocabulary: int, ep: int, router: Kind) -> Iterator[PlannedParam]:
    """The parameters of ``distmuon.train.model.MoETransformer``."""
    width, hidden = config.width, config.expert_hidden
    keys = config.kv_heads * (width // config.heads)
    # The tokens of all ep ranks are spread over the experts.
    tokens = config.top_k * ep / config.experts
    shapes = {"gate": (hidden, width)} if config.expert == "swiglu" else {}
    shapes |= {"up": (hidden, width), "down": (width, hidden)}
    table = ParamSpec("embedding.weight", (vocabulary, width), "adamw")
    yield PlannedParam(table, "elementwise", "embedding", 0.0)
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        yield _gain(f"{prefix}attention_norm.weight", width)
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("out", width)):
            spec = ParamSpec(f"{prefix}attention.{name}.weight", (rows, width), "muon")
            yield PlannedParam(spec, "attention", "hidden matrix", 2.0 * spec.numel)
        yield _gain(f"{prefix}moe_norm.weight", width)
        gate = ParamSpec(f"{prefix}moe.deepspeed_moe.gate.wg.weight", (config.experts, width), router)
        yield PlannedParam(gate, "dense" if router == "muon" else "elementwise", "router", 2.0 * gate.numel)
        for number in range(config.experts // ep):
            for name, shape in shapes.items():
                name = f"{prefix}moe.deepspeed_moe.experts.deepspeed_experts.{number}.{name}.weight"
                spec = ParamSpec(name, shape, "muon")
                yield PlannedParam(spec, "expert", "hidden matrix", 2.0 * spec.numel * tokens, expert=True)
    yield _gain("norm.weight", width)
    head = ParamSpec("head.weight", (vocabulary, width), "adamw")
    yield PlannedParam(head, "elementwise", "LM head", 2.0 * head.numel, exists=not config.tie_embeddings)


def _gain(name: str, numel: int) -> PlannedParam:
    return PlannedParam(ParamSpec(name, (numel,), "adamw"), "elementwise", "1-D", 0.0)

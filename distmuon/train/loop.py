"""The training loop: updates, evaluations, checkpoints, metrics, report."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distmuon.dist_muon import DistMuon
from distmuon.train import engine as engines
from distmuon.train.config import RunConfig
from distmuon.train.data import SequenceOrder, TokenData, gather
from distmuon.train.evaluate import Score, bits_per_byte, evaluate
from distmuon.train.metrics import (
    Collective,
    EvalRecord,
    FinalRecord,
    MetricsWriter,
    OptimizerInfo,
    RunRecord,
    StepRecord,
)
from distmuon.train.preemption import StopRequest
from distmuon.train.progress import Progress
from distmuon.train.provenance import environment, routing_summary
from distmuon.train.saving import checkpoints_of, resume
from distmuon.train.trace import Tracer
from distmuon.watchdog import Watchdog

log = logging.getLogger(__name__)


class Totals(NamedTuple):
    """Means over the ranks and micro-batches of one update."""

    loss: float
    aux_loss: float
    load_max_over_mean: float
    stop: bool


class Trainer:
    """A run under way; every rank has one.

    Args:
        run: the configuration.
        data: the tokens.
        engine: the DeepSpeed engine.
        metrics: where rank 0 records; None elsewhere.
    """

    def __init__(self, run: RunConfig, data: TokenData, engine: Any, metrics: MetricsWriter | None) -> None:
        self.run, self.data, self.engine, self.metrics = run, data, engine, metrics
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.accumulation = run.accumulation(self.world)
        self.order = SequenceOrder(data.train.size, run.model.context, run.seed)
        self.tokens_per_update = run.batch.sequences * run.model.context
        self.done = self.first = 0
        # The recorded learning rate is that of most parameters: the hidden matrices'.
        sizes = [sum(p.numel() for p in group["params"]) for group in engine.optimizer.param_groups]
        self.largest_group = sizes.index(max(sizes))
        self.checkpoints = checkpoints_of(engine, run.directory / "checkpoints", run.checkpoint)
        self.started = time.perf_counter()

    @property
    def dist_muon(self) -> DistMuon | None:
        """The optimizer, if it is ours."""
        return self.engine.optimizer if isinstance(self.engine.optimizer, DistMuon) else None

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        self.done = resume(self.engine, self.run.directory / "checkpoints")

    def fit(self, stop: StopRequest) -> None:
        """Run all remaining updates and leave a final checkpoint and record.

        Args:
            stop: when it was received on any rank, all ranks save a checkpoint and return before the end.
        """
        run = self.run
        self.first = self.done
        self.tracer = Tracer(run, self.done, self.dist_muon.clock if self.dist_muon else None)
        self._record_start()
        progress = Progress(run.schedule.updates, initial=self.done, enabled=self.rank == 0)
        watchdog = Watchdog(run.directory, self.rank, run.watchdog_s)
        with progress, watchdog, closing(self.tracer):
            while self.done < run.schedule.updates:
                self.tracer.begin(self.done + 1)
                record, stopping = self._update(stop.received)
                watchdog.beat(self.done)
                progress.update(self.done, record.loss, record.tokens_per_s)
                traced = self.tracer.end(self.done, stopping)
                if traced and self.metrics:
                    self.metrics.write(traced)
                    progress.note(f"timeline of updates {traced.first} to {traced.last}: {self.tracer.path}")
                if self.done % run.evaluation.every == 0 and self.done < run.schedule.updates:
                    with watchdog.paused():
                        score = self._evaluate()
                    progress.note(f"update {self.done}: validation loss {score.loss:.4f}")
                if self.done == run.schedule.updates:
                    break
                if stopping or self.done % run.checkpoint.every == 0:
                    with watchdog.paused():
                        self.checkpoints.save(self.done, last=stopping)
                if stopping:
                    progress.note(f"stopped by SIGTERM after update {self.done}; go on with --resume auto")
                    return
            with watchdog.paused():
                if self.done > self.first:
                    self.checkpoints.save(self.done, last=True)
                score = self._evaluate()
            self._record_final(score)
            progress.note(f"final validation loss {score.loss:.4f} over {run.evaluation.sequences} sequences")

    def _update(self, stop: bool) -> tuple[StepRecord, bool]:
        """One optimizer update; also whether any rank wants to stop."""
        start = time.perf_counter()
        lr = self.engine.get_lr()[self.largest_group]
        with self.tracer.span("update", update=self.done + 1):
            totals = self._forward_backward(stop)
        self.done += 1
        seconds = time.perf_counter() - start
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        exposed = self.dist_muon.clock.waited if self.dist_muon and self.world > 1 else None
        split = self.dist_muon.clock.clear() if self.dist_muon else {}
        record = StepRecord(
            step=self.done,
            loss=totals.loss,
            aux_loss=totals.aux_loss,
            grad_norm=float(self.engine.get_global_grad_norm()),
            lr=lr,
            tokens=self.done * self.tokens_per_update,
            tokens_per_s=self.tokens_per_update / seconds,
            seconds=seconds,
            split={"forward_backward": seconds - sum(split.values()), **split},
            exposed_seconds=exposed,
            skipped=skipped,
            expert_load_max_over_mean=totals.load_max_over_mean,
        )
        if self.metrics:
            self.metrics.write(record)
        return record, totals.stop

    def _forward_backward(self, stop: bool) -> Totals:
        """All micro-batches of an update, the last of which steps the optimizer."""
        ids = self.order.ids(self.done * self.run.batch.sequences, self.run.batch.sequences)
        mine = ids.reshape(self.world, self.accumulation, -1)[self.rank]
        losses = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        counts_LE = torch.zeros(
            self.run.model.layers, self.run.model.experts, dtype=torch.float64, device=self.engine.device
        )
        for number, micro in enumerate(mine):
            with self.tracer.span("forward", micro_batch=number):
                x_BT, y_BT = gather(self.data.train, micro, self.run.model.context)
                output = self.engine(x_BT.to(self.engine.device), y_BT.to(self.engine.device))
            with self.tracer.span("backward", micro_batch=number):
                self.engine.backward(output.objective)
            with self.tracer.span("step", micro_batch=number):
                self.engine.step()
            losses += torch.stack([output.loss, output.aux_loss]) / (self.accumulation * self.world)
            counts_LE += output.expert_counts_LE
        sums = torch.cat([losses, losses.new_tensor([float(stop)]), counts_LE.flatten()])
        with self.tracer.span("share_metrics"):
            dist.all_reduce(sums)
        counts_LE = sums[3:].view_as(counts_LE)
        load = (counts_LE.amax(1) / counts_LE.mean(1)).max()
        return Totals(float(sums[0]), float(sums[1]), float(load), stop=bool(sums[2] > 0))

    def _evaluate(self) -> Score:
        context, micro = self.run.model.context, self.run.batch.micro_sequences
        sequences = self.run.evaluation.sequences
        score = evaluate(self.engine.module, self.data, context, sequences, micro)
        if self.metrics:
            bits = bits_per_byte(score.loss, self.data)
            self.metrics.write(
                EvalRecord(
                    step=self.done,
                    loss=score.loss,
                    accuracy=score.accuracy,
                    bits_per_byte=bits,
                    sequences=sequences,
                )
            )
        return score

    def _state_bytes(self) -> list[int]:
        """Optimizer state of every rank."""
        own = self.dist_muon.state_bytes() if self.dist_muon else _stock_state_bytes(self.engine.optimizer)
        values = torch.zeros(self.world, dtype=torch.int64, device=self.engine.device)
        values[self.rank] = own
        dist.all_reduce(values)
        return [int(value) for value in values]

    def _record_start(self) -> None:
        state_bytes = self._state_bytes()
        if not self.metrics:
            return
        routing = routing_summary(engines.route_model(self.run.optimizer, self.engine.module), self.engine.module)
        if self.run.optimizer.name != "distmuon":
            routing = [row.model_copy(update={"kind": "adamw"}) for row in routing]
        self.metrics.write(
            RunRecord(
                name=self.run.name,
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                config=self.run.model_dump(mode="json"),
                environment=environment(self.run),
                data=dict(self.data.meta),
                optimizer=OptimizerInfo(name=self.run.optimizer.name, routing=routing),
                state_bytes_per_rank=state_bytes,
            )
        )

    def _record_final(self, score: Score) -> None:
        state_bytes = self._state_bytes()
        if not self.metrics:
            return
        self.metrics.write(
            FinalRecord(
                step=self.done,
                val_loss=score.loss,
                val_accuracy=score.accuracy,
                bits_per_byte=bits_per_byte(score.loss, self.data),
                tokens=self.done * self.tokens_per_update,
                wall_seconds=time.perf_counter() - self.started,
                comm=self._collectives(),
                state_bytes_per_rank=state_bytes,
            )
        )

    def _collectives(self) -> list[Collective]:
        """Traffic of the optimizer per update."""
        if self.dist_muon is None:
            return []
        steps = max(1, self.done - self.first)
        return [
            Collective(
                collective=key.collective,
                group_size=key.group_size,
                dtype=key.dtype,
                calls_per_step=cost.calls / steps,
                payload_bytes_per_step=cost.payload / steps,
                wire_bytes_per_step=cost.wire / steps,
            )
            for key, cost in sorted(self.dist_muon.traffic.costs.items())
        ]


def _stock_state_bytes(optimizer: Any) -> int:
    """Bytes of state tensors of a stock DeepSpeed ZeRO-1 optimizer, master weights included."""
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    masters = getattr(optimizer, "single_partition_of_fp32_groups", [])
    tensors = [value for value in [*states, *masters] if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

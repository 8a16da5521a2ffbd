"""The training loop that every method shares: an objective and a schedule make it a method.

One step: read a batch, augment and normalise it on the device, encode it with the model, form the
objective over all ranks, back-propagate, check, step the optimiser. Nothing is stepped that is not
finite, and an interrupted run keeps the state it has reached.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._native import sent
from ..batches import InputRules, model_input
from ..distributed import Ranks
from ..models import logit_scale_parameters
from .checkpoints import (
    CheckpointFolder,
    Checkpoints,
    State,
    not_finite,
    restore,
    train_state,
)
from .faults import Fault, NonFiniteError
from .feed import Feed, Item
from .gradients import Gradients
from .groups import decay_groups, set_train_mode
from .guard import Checked, Guard
from .interrupts import DeferredInterrupt, exception_of
from .known import Known
from .lock import LockedText
from .objective import Given, Objective, Preparation, takes_own_rows
from .progress import Progress
from .settings import PRECISIONS, Schedule, Settings, StepHook, Tracker, TrainLog
from .sharding import Parts, shard
from .towers import Encoder, TextTrim
from .watch import Watch

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own bound on the learned temperature
_OBJECTIVE = "objective/"  # what the names of its tensors begin with in a checkpoint


class _Lost(Exception):
    """The weights are not finite: only a checkpoint helps."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.cause)
        self.fault = fault


def train(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    schedule: Schedule,
    settings: Settings,
    *,
    rules: InputRules,
    device: torch.device,
    on_step: StepHook | None = None,
    track: Tracker | None = None,
    log: TrainLog | None = None,
    checkpoints: Checkpoints | None = None,
    config: Mapping[str, Any] | None = None,
) -> TrainLog:
    """Train ``model`` in place; every rank of a distributed run calls this with its own share.

    Whatever ends the run early, Ctrl-C and SIGTERM included, finds the model at the last whole step
    and ``log`` complete up to it; of signals, where checkpoints are kept, one of it is written.

    Args:
        model: on ``device``, with the same weights on every rank. With ``settings.shard`` it may
            lie elsewhere; each rank keeps a part of it, ``sharding.joined`` gives the whole.
        loader: yields this rank's batches (see ``batches``); walked anew for each epoch, the first
            being epoch 0, after ``set_epoch`` where it or its sampler has one.
        on_step: called after each step with (step, record, model); returning True ends the run,
            whichever rank says so. On a GPU it makes every step wait for its numbers.
        track: called with (step, record) once a step's numbers have arrived. Both records have
            progress.PACE, too, which ``log`` has not: no two runs are equally fast.
        log: filled in as the run goes; default a new one.
        checkpoints: where the state is kept, and whether to continue from there; the same on every
            rank, the first one reads and writes.
        config: JSON-ready description of the run, which a resumed one must share.
    Raises:
        ValueError, TypeError: a batch, the model or a setting cannot be used; before any step
            where that can be known before.
        NonFiniteError: naming the cause; the model keeps its last good weights.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, once the step in flight is complete.
    """
    run = _Run(
        model, loader, objective, schedule, settings, rules, device, on_step, track,
        TrainLog() if log is None else log,
    )  # fmt: skip
    run.go(checkpoints, config or {})
    return run.log


class _Run:
    """One call of ``train``."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        objective: Objective,
        schedule: Schedule,
        settings: Settings,
        rules: InputRules,
        device: torch.device,
        on_step: StepHook | None,
        track: Tracker | None,
        log: TrainLog,
    ) -> None:
        self.model, self.schedule, self.settings = model, schedule, settings
        self.rules, self.device, self.log = rules, device, log
        self.on_step, self.track = on_step, track
        self.ranks = Ranks.start(device)
        self.loader, self.objective = loader, objective
        self.kept: dict[str, Tensor] = {}  # the objective's, for its load
        self.prepared = False
        self.watch = Watch(self.ranks)
        self.feed = Feed(
            loader, rules, self.ranks, device, steps=settings.steps, epochs=settings.epochs,
            seed=settings.seed, patient=self.watch.patient,
        )  # fmt: skip
        self.train_scale = not settings.freeze_scale and isinstance(model.logit_scale, nn.Parameter)
        if not self.train_scale:
            for p in logit_scale_parameters(model):
                p.requires_grad_(False)
        if settings.shard and not objective.shardable:
            raise ValueError(
                f"shard cannot be used with {type(objective).__name__}: its ranks need not encode "
                "equally often, or it looks at whole weights or gradients; leave it off"
            )
        if settings.shard and self.ranks.size > 1:
            shard(model, device)
        self.parts = Parts(model)
        named = [(n, p) for n, p in self.parts.named if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            decay_groups(named, settings.weight_decay), lr=0.0, betas=settings.betas, eps=1e-8,
            fused=True,
        )  # fmt: skip
        set_train_mode(model, settings.freeze_batchnorm)
        self.encode = Encoder(
            PRECISIONS[settings.precision], device, settings.compile, settings.micro_batch,
            self.ranks if self.parts.sharded else None,
        )  # fmt: skip
        self.locked = None if settings.lock is None else LockedText(model, self.encode)
        compiled = settings.compile is not None
        self.trim = TextTrim(
            model, settings.trim_text, compiled=compiled,
            grouped=device.type == "cpu" and not compiled and not self.parts.sharded,
            ranks=self.ranks if self.parts.sharded else None,
        )  # fmt: skip
        gradients = Gradients(
            model, objective, self.encode, train_scale=self.train_scale,
            micro_batch=settings.micro_batch, seed=settings.seed + 0x9E3779B1 * self.ranks.rank,
            locked=self.locked,
        )  # fmt: skip
        self.gradients = objective.around(gradients)
        # With a hook, which looks at the model of each step, the host keeps up with the device.
        hooks = self.ranks.agree([on_step is not None], device)
        lag = 0 if any(hook for (hook,) in hooks) else 1
        self.guard = Guard(model, self.parts.named, self.optimizer, self.ranks, device, lag)
        self.started = time.perf_counter()
        self.folder: CheckpointFolder | None = None

    def go(self, checkpoints: Checkpoints | None, config: Mapping[str, Any]) -> None:
        cuda = [self.device] if self.device.type == "cuda" else []
        together = False
        try:
            if checkpoints is not None:
                self._open(checkpoints, config)
            with torch.random.fork_rng(devices=cuda), DeferredInterrupt() as interrupt:
                with self.watch, self.watch.lost_ranks():
                    self._run(interrupt, kept=checkpoints is not None)
                if self.feed.signal > 1:
                    together = True
                    raise exception_of(self.feed.signal)
                if self.ranks.size == 1:  # it may have come with the last step
                    interrupt.check()
        except BaseException as error:
            together |= self.feed.failed or isinstance(error, NonFiniteError)
            self.log.scattered = self.parts.sharded and not together
            raise
        finally:
            self.log.skipped_batches = self.feed.position["skipped"]
            if self.folder is not None:
                self.folder.close()

    def _open(self, checkpoints: Checkpoints, config: Mapping[str, Any]) -> None:
        """Takes the folder and returns to its newest state; all ranks, or none."""
        refusal, state = None, None
        if self.ranks.rank == 0:
            try:
                self.folder = CheckpointFolder(checkpoints, config)
                state = self.folder.latest()
            except Exception as error:
                refusal = error
        said = self.ranks.from_first(None if refusal is None else str(refusal))
        if refusal is not None:
            raise refusal
        if said is not None:
            raise RuntimeError(f"rank 0 cannot use the folder of checkpoints: {said}")
        self._return_to(state)

    def _prepare(self) -> None:
        """Shows the objective the run; what a frozen tower gives may be computed here, once."""
        self.known = Known(
            self.loader, self.settings, self.feed.steps, self.encode, self.trim, self.device,
            self.ranks, self.watch, own_rows=takes_own_rows(self.objective),
        )  # fmt: skip
        if self.locked is not None:
            self.locked.features = self.known.texts(self.model)
        self.objective.prepare(
            Preparation(
                self.model, self.encode, self.device, self.known, self.ranks, self.rules,
                self.loader, self.feed.steps, self.settings.seed, self.watch.patient,
                self.parts.sharded,
            )
        )  # fmt: skip
        self.prepared = True
        if self.kept:
            self.objective.load(self.kept)
            self.kept = {}

    def _run(self, interrupt: DeferredInterrupt, kept: bool) -> None:
        self._prepare()
        done, first = len(self.log.steps), self.ranks.rank == 0
        over = done > 0 and self.objective.enough(done - 1)
        if any(flag for (flag,) in self.ranks.agree([over], self.device)):
            return  # of a run that had ended by itself
        with Progress(self.feed.steps, self.settings.progress, first, self.device, self.log) as bar:
            while True:
                self._when_to_save()
                try:
                    if not self._walk(bar, interrupt):
                        if kept:
                            self._save()
                        return
                except _Lost as lost:
                    with self.watch.patient():
                        state = None if self.folder is None else self.folder.latest()
                        if not kept or not self._return_to(state):
                            cause = f"{lost.fault.cause}; no earlier state is kept"
                            raise NonFiniteError(cause) from None
                    bar.go_back()
                except BaseException:  # a step whose numbers are on their way has been applied
                    self.track = self.on_step = None
                    with suppress(Exception):
                        self._settle(self.guard.arrived(all_of_them=True), bar)
                    raise

    def _walk(self, bar: Progress, interrupt: DeferredInterrupt) -> bool:
        """Steps until the feed ends; True where a batch was left out and the walk starts anew."""
        for item in self.feed:
            self._step(item.after["given"] - 1, item)
            self.watch.step()
            with self.watch.patient():
                if self.objective.enough(item.after["given"] - 1):
                    self.feed.stop()
            if self._settle(self.guard.arrived(), bar):
                return True
            if item.save:
                if self._settle(self.guard.arrived(all_of_them=True), bar):
                    return True
                self._save()
            if interrupt.pending:
                self.feed.stop(interrupt.pending)
            self._when_to_save()
        return self._settle(self.guard.arrived(all_of_them=True), bar)

    def _when_to_save(self) -> None:
        self.feed.save = self.folder is not None and self.folder.due()

    def _step(self, step: int, item: Item) -> None:
        given = Given(
            step, item.epoch, item.batch, item.ids,
            item.counts if self.ranks.size > 1 else None,
            item.batch.captions if self.known.numbered else None,
            partial(self._input, view=self.settings.view(item.epoch)),
        )  # fmt: skip
        self.known.begin(item.ids, item.epoch)
        self.guard.begin()
        self.parts.drop_gradients()
        with self.encode.products(self.model):
            x, tokens = self.objective.inputs(given)
            tokens = self.trim(tokens)
            if isinstance(tokens, Tensor):  # else on the CPU
                tokens = sent(tokens, self.device)
            if self.locked is not None:
                self.locked.freeze(tokens)
            outcome = self.gradients(x, tokens, given)
        self.parts.sum_gradients(self.ranks)
        self.guard.watch(step, item, item.ids, outcome)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step, self.feed.steps)
        with self.guard.applying():
            self.optimizer.step()
        if self.train_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def _input(
        self,
        images: Tensor,
        ids: Tensor,
        augmented: bool,
        trigger: Mapping[str, Any] | None,
        view: int,
    ) -> Tensor:  # [n, 3, H, W]
        settings = self.settings
        return model_input(
            images, self.rules, device=self.device, dtype=self.encode.input_dtype(self.model),
            ids=ids, augment=settings.augment if augmented else None, seed=settings.seed, view=view,
            trigger=trigger,
        )  # fmt: skip

    def _settle(self, steps: Iterable[Checked], bar: Progress) -> bool:
        """Writes down the steps that stand; True where the last one must be done without."""
        for item, record, fault in steps:
            step = item.after["given"] - 1
            if fault is not None:
                self._take_back(item, step, fault)
                return True
            record["lr"] = self.schedule(step, self.feed.steps)
            log, now = self.log, time.perf_counter()
            log.pairs += sum(item.counts)
            log.seconds, log.waiting = now - self.started, self.feed.waiting
            log.skipped_batches = item.after["skipped"]
            log.steps.append({"step": step, "epoch": item.epoch, **record})
            record |= bar.advance(record)
            if self.track is not None:
                self.track(step, record)
            if self.on_step is not None:
                with self.watch.patient():
                    if self.on_step(step, record, self.model) is True:
                        self.feed.stop()
                self.started += time.perf_counter() - now  # the hook's time is its own
        return False

    def _take_back(self, item: Item, step: int, fault: Fault) -> None:
        self._count(fault)
        self.guard.lower()
        self.feed.leave_out(item, given=step)

    def _count(self, fault: Fault) -> None:
        """Notes a fault; raises where it is one too many, or only an earlier state helps."""
        self.log.faults.append(fault.cause)
        count = len(self.log.faults)
        if fault.weights and count <= self.settings.max_faults:
            raise _Lost(fault)
        if count > self.settings.max_faults:
            which = f", fault {count}" if count > 1 else ""
            kept = "last checkpoint is" if fault.weights else "weights of the step before are"
            raise NonFiniteError(f"{fault.cause}{which}; the {kept} kept")

    def _save(self) -> None:
        """Every rank looks at its own weights; the first one writes."""
        step = len(self.log.steps)
        unsaved = step > 0 and (self.folder is None or self.folder.step != step)
        with self.watch.patient():  # another rank's hook may take its time
            if not any(mine for (mine,) in self.ranks.agree([unsaved], self.device)):
                return
            tensors = train_state(self.parts, self.optimizer, self.ranks.rank == 0)
            tensors |= {_OBJECTIVE + n: t.detach().cpu() for n, t in self.objective.state().items()}
            broken = not_finite(tensors, self.guard.watched)
            found = self.ranks.agree([bool(broken)], self.device)
            if any(bad for (bad,) in found):
                cause = f"after step {step - 1}: not finite: {broken or 'a weight of another rank'}"
                self._count(Fault(step, cause, True))
            if self.folder is not None:
                content = {"position": self.feed.position, "log": self.log.kept()}
                self.folder.save(step, tensors, content)

    def _return_to(self, state: State | None) -> bool:
        """Puts the first rank's state back, on every rank; False where it has none."""
        content = self.ranks.from_first(None if state is None else state.content)
        if content is None:
            return False
        held = {} if state is None else state.tensors
        shapes, tensors = self.ranks.tensors_from_first(held, self.device)
        others = restore(shapes, tensors, self.parts, self.optimizer)
        self.kept = {name.removeprefix(_OBJECTIVE): tensor for name, tensor in others.items()}
        if self.prepared and self.kept:
            self.objective.load(self.kept)
            self.kept = {}
        self.feed.position = content["position"]
        self.log.return_to(content["log"])
        self.started, self.feed.waiting = time.perf_counter() - self.log.seconds, self.log.waiting
        self.guard.lower()
        return True

"""Trains an AESA-Net: one loop, the same on a CPU, a GPU or several, that can be killed at any moment and go on."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from aesanet.errors import CheckpointError, InputError, TrainingError
from aesanet.files import replacing
from aesanet.hashing import file_sha256
from aesanet.models.aesanet import TRUNK_PREFIX, AESANet
from aesanet.models.checkpoint import read_config, save_checkpoint
from aesanet.models.config import Calibration
from aesanet.training.background import ahead
from aesanet.training.batches import Part, load_batch, training_batches
from aesanet.training.cache import weights_sha256
from aesanet.training.config import TrainingConfig, learning_rate
from aesanet.training.dataset import Data, Trunk
from aesanet.training.deterministic import deterministic, seed_step
from aesanet.training.learner import Learner, whole_clips
from aesanet.training.losses import ClipOutputs, Loss, training_loss
from aesanet.training.monitor import read_signs, read_warnings
from aesanet.training.processes import Processes, own_device
from aesanet.training.progress import Progress
from aesanet.training.report import (
    LOSSES,
    epoch_lines,
    epoch_row,
    plot_epochs,
    write_account,
    write_epochs,
    write_validation,
)
from aesanet.training.state import STATE_NAME, Position, load_state, run_identity, save_state
from aesanet.training.triplet import TripletBuffer, TripletCounters

BEST_NAME = "best.safetensors"
PLOT_SECONDS = 60.0
"""Between two plots of a run of short epochs."""


@dataclass(frozen=True)
class TrainingResult:
    """What became of a run; `finished` is false where it was told to stop before its end."""

    checkpoint: Path
    best_epoch: int
    best_mse: float
    epochs: int
    finished: bool


def train(
    model: AESANet,
    trunk: Trunk,
    training: Data,
    validation: Data,
    config: TrainingConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    beats_sha256: str | None = None,
    sources: Sequence[str | Path] = (),
    processes: Processes | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train `model` in place, and write what `out` is to hold: best.safetensors and its account.

    training, validation : from `training.cache.cached_data`, made with this model, trunk and `config.window`
    beats_sha256 : of the public BEATs file of a frozen trunk, which best.safetensors then leaves out
    sources      : label files, for the account
    processes    : those that torchrun started, see `training.processes.started_processes`
    stop         : asked after every step; once it says so, the state is saved and the run can go on later

    The model's config gets the window policy trained with, and the identity as its calibration. A run that was
    stopped or killed goes on when called again with the same arguments; on a CPU, with as many threads, it ends with
    the same bytes. Not all CUDA kernels are deterministic.

    Raises InputError (the folder holds a run with other settings) or TrainingError (the loss is no longer finite).
    """
    run = _Run(model, trunk, training, validation, config, out, progress or Progress(), processes or Processes(), stop)
    run.beats_sha256 = beats_sha256
    with deterministic(run.device):
        return run.all(sources)


class _Run:
    beats_sha256: str | None

    def __init__(
        self,
        model: AESANet,
        trunk: Trunk,
        training: Data,
        validation: Data,
        config: TrainingConfig,
        out: Path,
        progress: Progress,
        processes: Processes,
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.trunk, self.training, self.validation = model, trunk, training, validation
        self.config, self.out, self.progress, self.processes, self.stop = config, out, progress, processes, stop
        self.device = own_device(config.device)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        head = msgspec.structs.replace(model.config.head, calibration=Calibration())
        model.config = msgspec.structs.replace(model.config, head=head, window=config.window)
        model.head.calibration.copy_(torch.tensor([[1.0], [0.0]]))
        self.identity = run_identity(
            config,
            precision="bf16" if self.bf16 else "fp32",
            device=self.device.type,
            processes=processes.size,
            trunk=trunk,
            model_config=msgspec.json.encode(model.config).decode(),
            initial_weights=weights_sha256(model),
            training_data=training.sha256(),
            validation_data=validation.sha256(),
        )
        model.to(self.device)
        self.learner = Learner(model, trunk, self.bf16)
        self.module: nn.Module = self.learner
        if processes.size > 1:
            own = [self.device] if self.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(self.learner, device_ids=own, broadcast_buffers=False)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        self.optimizer = optimizer(self.weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.buffer = TripletBuffer(
            config.triplet,
            config.triplet_axis,
            capacity=config.triplet_buffer,
            margin=config.triplet_margin,
            epsilon=config.triplet_epsilon,
            seed=config.seed,
        )
        self.position = Position()
        self.total_steps = config.epochs * -(-len(training.clips) // config.batch_size)
        self.saved_at = self.plotted_at = self.began_at = time.monotonic()

    def all(self, sources: Sequence[str | Path]) -> TrainingResult:
        """Every epoch that is still to be trained."""
        self._resume()
        if self.position.finished:
            self.progress.note(f"{self.out}: this run has finished; nothing to do")
            return self._result()
        self._write_start(sources)
        while not self.position.finished:
            self.began_at = time.monotonic()
            if not self._epoch():
                self._save()
                return self._result()
            self._end_epoch()
        return self._result()

    def _epoch(self) -> bool:
        """Train what is left of the epoch; false where it was told to stop in it."""
        at, config = self.position, self.config
        batches = training_batches(self.training, config.batch_size, config.seed, at.epoch)
        todo = batches[at.batch :]
        self.learner.train()
        self.progress.start(f"epoch {at.epoch}", len(batches), at.batch)
        try:
            loads = ahead(todo, self._load)
            for parts, inputs in zip(todo, loads, strict=True):
                stopped = self._step(parts, inputs)
                self.progress.step()
                if stopped:
                    return False
                if time.monotonic() - self.saved_at >= 60 * config.save_minutes:
                    self._save()
            return True
        finally:
            self.progress.end()

    def _load(self, parts: list[Part]) -> tuple[torch.Tensor, ...]:
        """This process's share of a batch."""
        batch = load_batch(self.training, [parts[row] for row in self.processes.share(len(parts))], self.trunk)
        return batch.inputs, batch.num_tokens, batch.labels

    def _step(self, parts: list[Part], inputs: tuple[torch.Tensor, ...]) -> bool:
        """One batch; true where some process was told to stop."""
        at = self.position
        seed_step(self.config.seed, at.step, self.processes.rank)
        rate = learning_rate(self.config, at.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.module(*(value.to(self.device) for value in inputs))
        told = rows.new_full((len(rows), 1), float(self.stop()))
        rows = self.processes.gather(torch.cat([rows, told], dim=1), len(parts))
        clips = torch.tensor([clip for clip, _ in parts])
        labels = torch.from_numpy(self.training.labels[clips.numpy()]).to(self.device)
        outputs = ClipOutputs.of_rows(rows[:, :-1])
        loss = training_loss(outputs, labels, clips.to(self.device), self.buffer, self.config)
        self.optimizer.zero_grad()
        # Each process has the gradient of its own rows only, and DistributedDataParallel takes their mean.
        (loss.total * self.processes.size).backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.gradient_norm)
        self._check_finite(loss, norm)
        self.optimizer.step()
        for name, value in zip(LOSSES, (loss.total, loss.clip, loss.frame, loss.triplet), strict=True):
            at.sums[name] = at.sums.get(name, 0.0) + value.item() * len(parts)
        at.batch += 1
        at.step += 1
        return bool(rows[:, -1].any())

    def _check_finite(self, loss: Loss, norm: torch.Tensor) -> None:
        if not (loss.total.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"step {self.position.step} of epoch {self.position.epoch}: the loss is {loss.total.item()} and its "
                f"gradient's norm {norm.item()}; try a lower learning rate, or fp32"
            )

    def _end_epoch(self) -> None:
        at, config = self.position, self.config
        scores, embeddings = whole_clips(self.learner, self.validation, config.batch_size, self.device, self.processes)
        if not (np.isfinite(scores).all() and np.isfinite(embeddings).all()):
            raise TrainingError(
                f"epoch {at.epoch}: the weights that its last step left give scores that are not finite; try a lower "
                "learning rate, or fp32"
            )
        labels = self.validation.labels.astype(np.float64)
        at.signs.append(read_signs(scores, embeddings, labels, config.triplet_axis))
        signs, counters = at.signs[-1], self.buffer.counters
        warnings = read_warnings(at.signs, counters, config)
        train = {name: total / len(self.training.clips) for name, total in at.sums.items()}
        seconds = at.seconds + time.monotonic() - self.began_at
        rate = learning_rate(config, at.step - 1, self.total_steps)
        row = epoch_row(at.epoch, rate, train, signs, counters, warnings)
        at.rows.append({"epoch": at.epoch, "seconds": seconds, **row})
        best = signs.mean_mse < at.best_mse
        if best:
            at.best_epoch, at.best_mse = at.epoch, signs.mean_mse
        at.finished = at.epoch == config.epochs or at.epoch - at.best_epoch >= config.patience
        for line in epoch_lines(at.rows[-1], best, warnings):
            self.progress.note(line)
        if self.processes.rank == 0:
            write_epochs(at.rows, self.out)
            if at.finished or time.monotonic() - self.plotted_at >= PLOT_SECONDS:
                plot_epochs(at.rows, self.out)
                self.plotted_at = time.monotonic()
        at.epoch, at.batch, at.seconds, at.sums = at.epoch + 1, 0, 0.0, {}
        self.buffer.counters = TripletCounters()
        self.began_at = time.monotonic()
        self._save()
        if best:
            self._save_best()

    def _save(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self.began_at
        self.began_at = self.saved_at = now
        if self.processes.rank == 0:
            state = self.model.state_dict()
            if self.trunk == "frozen":
                state = {name: value for name, value in state.items() if not name.startswith(TRUNK_PREFIX)}
            tensors = {"model": state, "optimizer": self.optimizer.state_dict(), "buffer": self.buffer.state_dict()}
            save_state(self.out, self.identity, self.position, tensors)

    def _save_best(self) -> None:
        """After the state, which holds the same weights: killed between the two, going on makes up for it."""
        if self.processes.rank == 0:
            with replacing(self.out / BEST_NAME) as beside:
                save_checkpoint(self.model, beside, self.beats_sha256)
                with open(beside, "rb") as file:
                    os.fsync(file.fileno())  # as the state is: it cannot be made again

    def _resume(self) -> None:
        if (found := load_state(self.out, self.identity)) is None:
            return
        self.position, tensors = found
        self.model.load_state_dict(tensors["model"], strict=False)  # a frozen trunk is not in it
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.buffer.load_state_dict(tensors["buffer"], self.device)
        self._check_best()
        if not self.position.finished:
            self.progress.note(f"{self.out}: going on in epoch {self.position.epoch}, step {self.position.step}")
            if self.position.rows and self.processes.rank == 0:
                write_epochs(self.position.rows, self.out)

    def _check_best(self) -> None:
        """Make up for a best checkpoint that is behind or damaged, while its weights are the last; or InputError."""
        best, damage = self.out / BEST_NAME, None
        try:
            read_config(best)  # and all that a file says of its own tensors
        except CheckpointError as error:
            damage = error
        if self.position.batch == 0 and 0 < self.position.best_epoch == self.position.epoch - 1:
            if damage or best.stat().st_mtime_ns < (self.out / STATE_NAME).stat().st_mtime_ns:
                self._save_best()
        elif damage and self.position.finished:
            raise InputError(
                f"{damage}; it was the best, of epoch {self.position.best_epoch}, and only the last weights are kept "
                "beside it: put it back, or train anew with another --out"
            )
        elif damage and self.position.best_epoch:
            self.progress.note(f"{damage}; it was the best so far, whose place the next epoch takes")
            self.position.best_mse = math.inf

    def _write_start(self, sources: Sequence[str | Path]) -> None:
        if self.processes.rank > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_validation(self.validation, self.out)
        account = {
            "run": self.identity,
            "config": msgspec.to_builtins(self.config),
            "model": msgspec.to_builtins(self.model.config),
            "beats_sha256": self.beats_sha256,
            "labels": {str(file): file_sha256(file) for file in sources},
            "clips": {"training": len(self.training.clips), "validation": len(self.validation.clips)},
            "machine": {"device": str(self.device), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
        }
        write_account(account, self.out)

    def _result(self) -> TrainingResult:
        at = self.position
        return TrainingResult(self.out / BEST_NAME, at.best_epoch, at.best_mse, len(at.rows), at.finished)

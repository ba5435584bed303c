"""Training: a checked configuration, a loop that survives crashes, and a folder per run that says everything."""
from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import errno
import io
import json
import math
import os
import pickle
import platform
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__
from .augmentation import OPERATIONS, Augmentation
from .bridge import BRIDGES
from .data import Batch, SegmentationData, Split, normalise
from .decoder import DECODERS
from .losses import LOSSES, weighted_loss
from .metrics import MEASURES, SegmentationMetrics, confusion_counts, hard_masks, scores_in_percent
from .model import QTSeg, write_then_rename

# %%
OPTIMISERS: dict[str, Callable] = {
    "adamw": lambda weights, c: torch.optim.AdamW(weights, c.lr, c.betas, weight_decay=c.weight_decay, fused=True),
    "adam": lambda weights, c: torch.optim.Adam(weights, c.lr, c.betas, weight_decay=c.weight_decay, fused=True),
    "sgd": lambda weights, c: torch.optim.SGD(weights, c.lr, c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov, fused=True),
}

# %%
_schedulers = torch.optim.lr_scheduler

SCHEDULERS: dict[str, Callable] = {  # each steps once an epoch
    "constant": lambda optimiser, c: _schedulers.ConstantLR(optimiser, factor=1.0),
    "step": lambda optimiser, c: _schedulers.StepLR(optimiser, c.step_epochs, c.gamma),
    "multistep": lambda optimiser, c: _schedulers.MultiStepLR(optimiser, c.milestones, c.gamma),
    "exponential": lambda optimiser, c: _schedulers.ExponentialLR(optimiser, c.gamma),
    "cosine": lambda optimiser, c: _schedulers.CosineAnnealingLR(optimiser, c.epochs, c.min_lr),
    "plateau": lambda optimiser, c: _schedulers.ReduceLROnPlateau(optimiser, factor=c.gamma, patience=c.step_epochs),
    "restarts": lambda optimiser, c: _schedulers.CosineAnnealingWarmRestarts(optimiser, c.step_epochs, eta_min=c.min_lr),
    "polynomial": lambda optimiser, c: _schedulers.PolynomialLR(optimiser, c.epochs, c.power),
}

# %%
BEST = {"loss": min, "mae": min, "acc": max, "dice": max, "iou": max}  # the measures that each keep a best checkpoint
CHOICES = {"resize": ("squash", "pad"), "colour": ("rgb", "ycrcb"), "masks": ("auto", "index", "binary", "any"),
           "bridge": BRIDGES, "decoder": DECODERS, "optimiser": OPTIMISERS, "scheduler": SCHEDULERS,
           "amp": ("none", "bf16", "fp16"), "select": BEST}
SMALLEST = {"classes": 1, "size": 32, "width": 1, "heads": 1, "mlp_width": 1, "epochs": 1, "batch": 1, "step_epochs": 1,
            "validate_every": 1, "valid_batch": 1, "freeze_epochs": 0, "most_operations": 0, "strength": 0.0, "clip": 0.0,
            "weight_decay": 0.0, "min_lr": 0.0, "momentum": 0.0, "seed": 0}

# %%
def _type_name(hint) -> str:
    """A type as a person says it: `int | None` -> "a whole number or null"."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a mapping",
             types.NoneType: "null"}
    return " or ".join(names[typing.get_origin(part) or part] for part in (typing.get_args(hint) if _is_union(hint) else [hint]))


def _is_union(hint) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value, hint) -> bool:
    """Is the value of this type? An int counts as a float, a bool never as a number; lists and mappings item by item."""
    if _is_union(hint):
        return any(_fits(value, part) for part in typing.get_args(hint))
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))

# %%
class ConfigProblems:
    """The checks of `TrainConfig`, mixed into it: every problem is found, and all are named in one ValueError."""

    def _ill_typed(self) -> list[str]:
        hints = typing.get_type_hints(type(self))
        return [f"{f.name} is {_type_name(hints[f.name])}, not {getattr(self, f.name)!r}"
                for f in dataclasses.fields(self) if not _fits(getattr(self, f.name), hints[f.name])]

    def _out_of_range(self) -> list[str]:
        found = [f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}"
                 for name, choices in CHOICES.items() if getattr(self, name) not in choices]
        found += [f"{name} is at least {least}, not {getattr(self, name)}"
                  for name, least in SMALLEST.items() if getattr(self, name) < least]
        found += [f"{name} has the unknown entry {entry!r}: choose from {', '.join(known)}"
                  for name, known in (("losses", LOSSES), ("operations", OPERATIONS))
                  for entry in getattr(self, name) if entry not in known]
        if not self.lr > 0:
            found.append(f"lr is above 0, not {self.lr}")
        if not self.losses:
            found.append(f"losses names at least one of {', '.join(LOSSES)}")
        if not self.name or Path(self.name).name != self.name:
            found.append(f"name is the name of one folder, not {self.name!r}")
        return found

    def __post_init__(self):
        problems = self._ill_typed() or self._out_of_range()
        if problems:
            raise ValueError("the training configuration cannot be used: " + "; ".join(problems))

# %%
@dataclass
class TrainConfig(ConfigProblems):
    """Everything that decides a run; the defaults are the paper's recipe (section "Implementation details", release v0.1.0).

    Unknown names, wrong types and impossible values raise ValueError, which names them all.
    """

    # data, see SegmentationData.open; size in pixels
    data: str = "phantoms:all:400"
    classes: int = 2
    masks: str = "auto"
    size: int = 512
    resize: str = "squash"
    colour: str = "rgb"
    fold: int | None = None
    folds: int | None = None
    valid_share: float = 0.1
    cache: str | None = None
    # network; encoder_weights: an official encoder file (fpn-nano.pth), frozen for the first freeze_epochs
    bridge: str = "mlff"
    decoder: str = "mqm"
    width: int = 16
    depths: list[int] = field(default_factory=lambda: [1, 2, 3])
    heads: int = 8
    mlp_width: int = 2048
    encoder_weights: str | None = None
    freeze_epochs: int = 50
    # recipe
    epochs: int = 350
    batch: int = 32
    drop_last: bool = True
    losses: dict[str, float] = field(default_factory=lambda: {"ce_dice": 1.0})
    optimiser: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.99
    nesterov: bool = False
    scheduler: str = "step"
    step_epochs: int = 50
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.5
    power: float = 0.9
    min_lr: float = 1e-5
    clip: float = 0.0
    # augmentation, drawn per image: up to most_operations of operations, each at strength 1 as the recipe has it
    augment: bool = True
    operations: list[str] = field(default_factory=lambda: list(OPERATIONS))
    most_operations: int = 4
    strength: float = 1.0
    # how it is computed
    amp: str = "none"
    compile: bool = False
    device: str = "auto"
    seed: int = 1996
    # what is checked and kept
    validate_every: int = 1
    valid_batch: int = 16
    select: str = "dice"
    runs: str = "runs"
    name: str = "phantoms"
    resume: bool = False
    track: bool = False
    progress: bool = True

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """A configuration from plain values (a YAML file, papermill parameters); ValueError names unknown keys."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown configuration keys: {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    def to_dict(self) -> dict:
        """Plain values, fit for JSON."""
        return dataclasses.asdict(self)

# %%
RESUMABLE = {"runs", "name", "resume", "track", "progress", "device", "cache"}  # may differ between a run and its continuation


def _same_recipe(config: TrainConfig, stored: dict) -> None:
    """Raise ValueError when a run would go on with another recipe than it began with."""
    now = config.to_dict()
    changed = [f"{key}: {stored.get(key)!r} -> {now[key]!r}" for key in now if key not in RESUMABLE and stored.get(key) != now[key]]
    if changed:
        raise ValueError(f"{config.folder} was begun with another configuration ({'; '.join(changed)}): "
                         "resume with the same values, or choose another name")

# %%
def choose_device(name: str) -> torch.device:
    """"auto" -> CUDA, Apple's MPS or the CPU, whichever is there first; else the device named. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): try device=\"cpu\"") from None
    return torch.device(name)

# %%
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system: fewer page faults on CPUs.

    Activations are large; by default each is handed back when freed and faulted in again, page by page, a step later.
    Does nothing where there is no glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)

# %%
def hardware(device: torch.device) -> dict[str, str | int]:
    """What the run was computed on: device, processor, cores, threads, operating system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processor": processor, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads(),
            "system": platform.platform()}

# %%
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version(), "qtseg": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "opencv": cv2.__version__}

# %%
def _autocast(device: torch.device, amp: str):
    """Mixed precision for the network, or nothing."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def _ready(split: Split, what: str) -> Split:
    if split is None or not len(split):
        raise ValueError(f"there are no {what} images: check the data folder, fold and valid_share")
    return split

# %%
@torch.no_grad()
def evaluate(model: nn.Module, split: Split, classes: int, *, batch: int = 16, device: str | torch.device = "cpu",
             amp: str = "none", losses: dict[str, float] | None = None) -> dict[str, float]:
    """Scores of a split at training size, in percent (see `SegmentationMetrics`), and its mean "loss".

    Puts the model in evaluation mode and back. ValueError for an empty split.
    """
    metrics, loss, total = SegmentationMetrics(classes), weighted_loss(losses or {"ce_dice": 1.0}), 0.0
    device, was_training = torch.device(device), model.training
    model.eval()
    try:
        for part in _ready(split, "validation").batches(batch, device=device):
            target = part.masks.long()
            with _autocast(device, amp):
                logits = model(normalise(part.images))
            total += loss(logits.float(), target).item() * len(target)
            metrics.update(logits.float(), target)
    finally:
        model.train(was_training)
    return {"loss": total / len(split), **metrics.compute()}

# %%
COLOURS = {"target": (230, 159, 0), "prediction": (86, 180, 233)}  # orange and sky blue: distinct for colour-blind eyes


def _outline(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw the border of every class of a mask [H, W] into a picture [H, W, 3], in place."""
    for label in range(1, int(mask.max()) + 1):
        contours, _ = cv2.findContours((mask == label).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, 1)

# %%
def mask_pictures(batch: Batch, predictions: Tensor, colour: str = "rgb") -> np.ndarray:
    """Images side by side, target outlined in orange, prediction in blue: uint8 [size, B·size, 3].

    `predictions` are hard masks [B, size, size]; `colour` is the colour space that the batch is stored in.
    """
    pictures = []
    for image, target, mask in zip(batch.images.cpu(), batch.masks.cpu(), predictions.cpu()):
        picture = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # [H, W, 3]
        if colour == "ycrcb":
            picture = cv2.cvtColor(picture, cv2.COLOR_YCrCb2RGB)
        _outline(picture, target.numpy(), COLOURS["target"])
        _outline(picture, mask.numpy(), COLOURS["prediction"])
        pictures.append(picture)
    return np.concatenate(pictures, axis=1)

# %%
class Tracker:
    """MLflow in an SQLite file beside the runs: parameters, metrics and pictures. With `track` off, it does nothing."""

    def __init__(self, config: TrainConfig, run_id: str | None = None):
        self.run_id, self._mlflow = run_id, None
        if not config.track:
            return
        try:
            import mlflow
        except ImportError:
            raise ModuleNotFoundError("track=True needs MLflow: pip install mlflow, or set track=False") from None
        root = Path(config.runs).resolve()
        root.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
        if mlflow.get_experiment_by_name("qtseg") is None:  # an explicit place, or artefacts go to ./mlruns
            mlflow.create_experiment("qtseg", artifact_location=(root / "mlartifacts").as_uri())
        mlflow.set_experiment("qtseg")
        run = mlflow.start_run(run_id=run_id, run_name=config.name)
        if run_id is None:
            mlflow.log_params(config.to_dict())
        self.run_id, self._mlflow = run.info.run_id, mlflow

    @property
    def active(self) -> bool:
        """Is anything tracked?"""
        return self._mlflow is not None

    def log(self, row: dict, picture: np.ndarray | None) -> None:
        """One epoch: its numbers, and a picture of validation masks."""
        if self._mlflow:
            self._mlflow.log_metrics({key: float(value) for key, value in row.items() if key != "epoch"}, step=row["epoch"])
            if picture is not None:
                self._mlflow.log_image(picture, f"masks/epoch_{row['epoch']:04d}.png")

    def finish(self, metrics: dict[str, float] | None) -> None:
        """The test scores, or None for a run that was stopped."""
        if self._mlflow:
            if metrics:
                self._mlflow.log_metrics({f"test_{key}": value for key, value in metrics.items()})
            self._mlflow.end_run("FINISHED" if metrics else "KILLED")

# %%
@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that the loop reads between two steps; a second one interrupts at once."""
    asked, before = threading.Event(), {}

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# %%
@contextlib.contextmanager
def _clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into one sentence. What was complete before stays complete."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError, safetensors its own
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"could not write the run's state ({reason}); earlier epochs are "
                      "safe: make room there, then run again with resume=True", str(folder)) from None

# %%
def _write_text(path: Path, text: str) -> None:
    write_then_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_history(path: Path, history: Sequence[dict]) -> None:
    """history.csv: a row per epoch; epochs without validation leave those cells empty."""
    names = list(dict.fromkeys(name for row in history for name in row))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(history)

    with _clear_disk_errors(path.parent):
        write_then_rename(path, write)

# %%
@dataclass
class Progress:
    """Where a run stands; everything but tensors that a continuation needs."""

    epoch: int = 0  # the epoch that is running, or comes next
    step: int = 0  # steps done in it
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch so far
    history: list[dict] = field(default_factory=list)
    best: dict[str, dict] = field(default_factory=dict)  # measure -> {"epoch", "value"}
    seconds: float = 0.0  # of training, validation included, over all sessions
    run_id: str | None = None  # MLflow's

# %%
def draw_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of one batch's augmentation, or with step -1 of the epoch's order, from these three numbers alone.

    Nothing that came before enters it, so a continued run draws exactly what the uninterrupted one would have drawn.
    """
    return int(np.random.SeedSequence([seed, epoch, step + 1]).generate_state(1, np.uint64)[0] >> 1)

# %%
class Trainer:
    """One run's network, optimiser and schedule, and one step of them. `fit` drives it."""

    def __init__(self, config: TrainConfig, data: SegmentationData):
        self.config, self.data, self.device = config, data, choose_device(config.device)
        images = len(_ready(data.train, "training"))
        self.steps = images // config.batch if config.drop_last else math.ceil(images / config.batch)
        if not self.steps:
            raise ValueError(f"{images} training images do not fill a batch of {config.batch}: lower batch, or drop_last=False")
        self.model = self._network().to(self.device)
        self.network = torch.compile(self.model) if config.compile else self.model
        self.optimiser = OPTIMISERS[config.optimiser](self.model.parameters(), config)
        self.scheduler = SCHEDULERS[config.scheduler](self.optimiser, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.augment = Augmentation(config.operations, config.most_operations if config.augment else 0, config.strength, data.black)
        self.loss = weighted_loss(config.losses)
        self.progress = Progress()

    def _network(self) -> QTSeg:
        """The network with seeded weights, whatever was drawn before; weights channels last, as its forward pass wants them."""
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            model = QTSeg(c.classes, 3, c.width, c.bridge, c.decoder, c.depths, c.heads, c.mlp_width)
        if c.encoder_weights is not None:
            model.load_encoder(c.encoder_weights, strict=False)
        return model.to(memory_format=torch.channels_last)

    def begin_epoch(self) -> Iterator[Batch]:
        """Freeze or free the encoder, and the epoch's batches from the step where the run stands."""
        c, p = self.config, self.progress
        frozen = c.encoder_weights is not None and p.epoch < c.freeze_epochs
        self.model.freeze_encoder() if frozen else self.model.unfreeze_encoder()
        self.model.train()
        return iter(self.data.train.batches(c.batch, shuffle=draw_seed(c.seed, p.epoch, -1), drop_last=c.drop_last,
                                            start=p.step, device=self.device))

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Augment, forward, backward, update -> the loss (scalar) and the counts [B, foreground classes, 4], not synchronised."""
        images, target = self.augment(batch.images, batch.masks, draw_seed(self.config.seed, self.progress.epoch, self.progress.step))
        with _autocast(self.device, self.config.amp):
            logits = self.network(images)
        logits = logits.float()  # losses sum over many pixels: float32 whatever the network computed in
        loss = self.loss(logits, target)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.clip:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach(), confusion_counts(hard_masks(logits.detach()), target, self.config.classes)

    def next_rate(self, loss: float) -> None:
        """One epoch of the schedule, never below min_lr; `loss` is what "plateau" watches."""
        self.scheduler.step(loss) if self.config.scheduler == "plateau" else self.scheduler.step()
        for group in self.optimiser.param_groups:
            group["lr"] = max(group["lr"], self.config.min_lr)

# %%
def _save_state(trainer: Trainer) -> None:
    """Write resume.pt: all that a continuation needs, whole or not at all."""
    state = {"progress": dataclasses.asdict(trainer.progress),
             "model": trainer.model.state_dict(), "optimiser": trainer.optimiser.state_dict(),
             "scheduler": trainer.scheduler.state_dict(), "scaler": trainer.scaler.state_dict()}
    with _clear_disk_errors(trainer.config.folder):
        write_then_rename(trainer.config.folder / "resume.pt", lambda path: torch.save(state, path))


def _load_state(trainer: Trainer) -> None:
    """Go on from resume.pt, if there is one. ValueError for a damaged file."""
    path = trainer.config.folder / "resume.pt"
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): delete {path.parent} and start again") from None
    for name in ("model", "optimiser", "scheduler", "scaler"):
        getattr(trainer, name).load_state_dict(state[name])
    trainer.progress = Progress(**state["progress"])

# %%
def _save_checkpoint(trainer: Trainer, name: str) -> None:
    """A checkpoint folder: weights and network in the Hugging Face layout, and how its images are prepared."""
    data, folder = trainer.data, trainer.config.folder / name
    preparation = {"size": data.size, "resize": data.resize, "colour": data.colour, "class_names": list(data.class_names)}
    with _clear_disk_errors(folder):
        trainer.model.save_pretrained(folder)
        _write_text(folder / "preprocessor_config.json", json.dumps(preparation, indent=2) + "\n")

# %%
def _keep_best(trainer: Trainer, scores: dict[str, float]) -> None:
    """Keep a checkpoint for each measure that this epoch improved."""
    p = trainer.progress
    for name, better in BEST.items():
        if name not in p.best or better(scores[name], p.best[name]["value"]) != p.best[name]["value"]:
            p.best[name] = {"epoch": p.epoch + 1, "value": scores[name]}
            _save_checkpoint(trainer, f"best_{name}")

# %%
def _settle(trainer: Trainer, pending: tuple | None, before: list[str]) -> list[str]:
    """Read a step's loss and Dice off the device into the epoch's sums, a step late, so that a GPU never waits for it.

    Returns the batch's ids. FloatingPointError, with them, when the loss is not finite.
    """
    if pending is None:
        return []
    loss, counts, ids = pending
    p, value = trainer.progress, loss.item()
    if not math.isfinite(value):
        cause = f", or by the step before it on {', '.join(before)}" if before else ""
        raise FloatingPointError(
            f"the loss became {value} in epoch {p.epoch + 1} on the images {', '.join(ids)}: caused by them{cause}. Look at these "
            f"images, lower lr (now {trainer.config.lr}) or set clip=1.0. {trainer.config.folder} holds the last good epoch.")
    p.sums["loss"] = p.sums.get("loss", 0.0) + value
    p.sums["dice"] = p.sums.get("dice", 0.0) + scores_in_percent(counts)[..., MEASURES.index("dice")].mean().item()
    return ids

# %%
def _train_epoch(trainer: Trainer, asked: threading.Event, bar: tqdm) -> bool:
    """Run the epoch from where it stands; False when it was asked to stop before the end."""
    p, batches, pending, ids = trainer.progress, trainer.begin_epoch(), None, []
    while p.step < trainer.steps and not asked.is_set():
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        result = (*trainer.step(batch), batch.ids)
        ids = _settle(trainer, pending, ids)
        pending = result
        p.step += 1
        p.sums["waited"] = p.sums.get("waited", 0.0) + waited
        p.sums["seconds"] = p.sums.get("seconds", 0.0) + time.perf_counter() - begin
        _show(bar, trainer)
    _settle(trainer, pending, ids)
    return p.step == trainer.steps


def _show(bar: tqdm, trainer: Trainer) -> None:
    """Advance the progress bar by a step."""
    p, c = trainer.progress, trainer.config
    if p.step > 1:  # sums lag a step behind
        bar.set_postfix_str(f"epoch {p.epoch + 1}/{c.epochs}, loss {p.sums['loss'] / (p.step - 1):.4f}, "
                            f"Dice {p.sums['dice'] / (p.step - 1):.1f}, {p.step * c.batch / p.sums['seconds']:.1f} images/s", refresh=False)
    bar.update()

# %%
def _finish_epoch(trainer: Trainer) -> dict:
    """Validate if it is time, keep the best, step the schedule -> the epoch's row of the history."""
    p, c, sums = trainer.progress, trainer.config, trainer.progress.sums
    row = {"epoch": p.epoch + 1, "lr": trainer.optimiser.param_groups[0]["lr"], "train_loss": sums["loss"] / trainer.steps,
           "train_dice": sums["dice"] / trainer.steps, "seconds": sums["seconds"],
           "images_per_second": min(trainer.steps * c.batch, len(trainer.data.train)) / sums["seconds"],
           "waited_percent": 100 * sums["waited"] / sums["seconds"]}
    if (p.epoch + 1) % c.validate_every == 0 or p.epoch + 1 == c.epochs:
        begin = time.perf_counter()
        scores = evaluate(trainer.model, trainer.data.valid, c.classes, batch=c.valid_batch, device=trainer.device, amp=c.amp,
                          losses=c.losses)
        row |= {f"valid_{name}": value for name, value in scores.items()} | {"valid_seconds": time.perf_counter() - begin}
        _keep_best(trainer, scores)
    trainer.next_rate(row.get("valid_loss", row["train_loss"]))
    p.history.append(row)
    p.epoch, p.step, p.sums = p.epoch + 1, 0, {}
    return row

# %%
@torch.no_grad()
def _validation_picture(trainer: Trainer, images: int = 4) -> np.ndarray:
    """A few validation images, spread over the split, with target and present prediction."""
    chosen = np.linspace(0, len(trainer.data.valid) - 1, min(images, len(trainer.data.valid))).astype(int)
    batch = trainer.data.valid.batch(chosen)
    trainer.model.eval()
    predictions = hard_masks(trainer.model(normalise(batch.images).to(trainer.device)))
    return mask_pictures(batch, predictions, trainer.data.colour)

# %%
def _line(row: dict) -> str:
    """An epoch in one line."""
    text = (f"epoch {row['epoch']:>3}  lr {row['lr']:.2e}  loss {row['train_loss']:.4f}  Dice {row['train_dice']:.2f}  "
            f"{row['seconds']:.0f} s, {row['images_per_second']:.1f} images/s, waited {row['waited_percent']:.1f} %")
    if "valid_dice" in row:
        text += f"  |  validation: loss {row['valid_loss']:.4f}  Dice {row['valid_dice']:.2f}  IoU {row['valid_iou']:.2f}"
    return text

# %%
@dataclass
class Result:
    """What `fit` returns: the scores as in metrics.json, the selected checkpoint's folder, a row per epoch, the run's folder."""

    metrics: dict
    checkpoint_dir: Path
    history: list[dict]
    folder: Path

# %%
def _final_metrics(trainer: Trainer) -> dict:
    """Scores of the selected checkpoint in float32 on validation and test split, and everything needed to reproduce them."""
    c, p, data = trainer.config, trainer.progress, trainer.data
    model = QTSeg.from_pretrained(c.folder / f"best_{c.select}").to(trainer.device)
    valid, test = (evaluate(model, split, c.classes, batch=c.valid_batch, device=trainer.device, losses=c.losses)
                   for split in (data.valid, data.test or data.valid))
    seconds = sum(row["seconds"] for row in p.history)
    speed = sum(row["seconds"] * row["images_per_second"] for row in p.history) / seconds
    waited = sum(row["seconds"] * row["waited_percent"] for row in p.history) / seconds
    return {"test": test, "test_is": "the test split" if data.test else "the validation split: this data has no test split",
            "valid": valid, "selected_by": c.select, "best": p.best,
            "train": {"seconds": p.seconds, "images_per_second": speed, "waited_percent": waited, "epochs": p.epoch},
            "images": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test or ())}, "notes": list(data.notes),
            "hardware": hardware(trainer.device), "versions": versions(), "config": c.to_dict()}

# %%
def open_data(config: TrainConfig) -> SegmentationData:
    """The data that a configuration names, checked and cached. `DataProblems` lists what is wrong with it."""
    c = config
    return SegmentationData.open(c.data, classes=c.classes, size=c.size, fold=c.fold, folds=c.folds, resize=c.resize, colour=c.colour,
                                 masks=c.masks, valid_share=c.valid_share, seed=c.seed, cache=c.cache, progress=c.progress)

# %%
def _claim_folder(config: TrainConfig) -> None:
    """Make the run's folder and write its configuration; FileExistsError when another run is in it and resume is off."""
    begun = [name for name in ("resume.pt", "metrics.json", "config.json") if (config.folder / name).exists()]
    if begun and not config.resume:
        raise FileExistsError(f"{config.folder} holds a run already: set resume=True to go on with it, or choose another name")
    if "config.json" in begun:
        _same_recipe(config, json.loads((config.folder / "config.json").read_text(encoding="utf-8")))
    with _clear_disk_errors(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
        _write_text(config.folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")

# %%
def _run(trainer: Trainer, tracker: Tracker, asked: threading.Event, on_epoch: Callable | None) -> None:
    """Epochs until the last one; KeyboardInterrupt after saving when it was asked to stop."""
    p, c, begin = trainer.progress, trainer.config, time.perf_counter()
    done = p.seconds
    bar = tqdm(total=c.epochs * trainer.steps, initial=p.epoch * trainer.steps + p.step, disable=not c.progress, unit="step",
               file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 5.0, dynamic_ncols=sys.stdout.isatty())
    with bar:
        while p.epoch < c.epochs:
            finished = _train_epoch(trainer, asked, bar)
            row = _finish_epoch(trainer) if finished else None
            if finished:  # the state comes last: whoever dies before it repeats the epoch and writes the same files again
                _save_checkpoint(trainer, "last")
                _write_history(c.folder / "history.csv", p.history)
            p.seconds = done + time.perf_counter() - begin
            _save_state(trainer)
            if not finished:
                raise KeyboardInterrupt(f"stopped in epoch {p.epoch + 1} after step {p.step}, saved in {c.folder}: "
                                        "run again with resume=True to go on from there")
            _tell(trainer, tracker, row, on_epoch, bar)

# %%
def _tell(trainer: Trainer, tracker: Tracker, row: dict, on_epoch: Callable | None, bar: tqdm) -> None:
    """Tell of an epoch: a line, the tracker, whoever listens."""
    if trainer.config.progress:
        bar.write(_line(row), file=sys.stdout)
    picture = _validation_picture(trainer) if "valid_dice" in row and (tracker.active or on_epoch) else None
    tracker.log(row, picture)
    if on_epoch:
        on_epoch(trainer.progress.history, picture)

# %%
def fit(config: TrainConfig, data: SegmentationData | None = None,
        on_epoch: Callable[[list[dict], np.ndarray | None], None] | None = None) -> Result:
    """Train, keep the best, evaluate the selected checkpoint; everything goes into config.folder.

    `data`: opened already (else `open_data(config)`). `on_epoch(history, picture of validation masks)` is called after every epoch.
    Ctrl-C or SIGTERM saves between two steps and raises KeyboardInterrupt; with `resume` a run goes on where it stopped, to the
    same result. ValueError (configuration, data), FileExistsError (a run is there), FloatingPointError (loss not finite, with
    the images' ids), OSError (disk). Source: training recipe of the official repository, release v0.1.0.
    """
    _claim_folder(config)
    trainer = Trainer(config, data if data is not None else open_data(config))
    _load_state(trainer)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    tracker = Tracker(config, trainer.progress.run_id)
    trainer.progress.run_id, metrics = tracker.run_id, None
    try:
        with stop_signals() as asked:
            _run(trainer, tracker, asked, on_epoch)
        metrics = _final_metrics(trainer)
        with _clear_disk_errors(config.folder):
            _write_text(config.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    finally:
        tracker.finish(metrics and metrics["test"])
    return Result(metrics, config.folder / f"best_{config.select}", trainer.progress.history, config.folder)

# %%
def draw_curves(history: Sequence[dict]):
    """Loss and Dice over epochs, training and validation -> a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), dpi=90, layout="constrained")
    for axes, measure, title in zip(figure.subplots(1, 2), ("loss", "dice"), ("loss", "Dice, percent")):
        for part, colour in (("train", "#0072B2"), ("valid", "#D55E00")):
            points = [(row["epoch"], row[f"{part}_{measure}"]) for row in history if f"{part}_{measure}" in row]
            axes.plot(*zip(*points), color=colour, marker="." if len(points) < 50 else None, label={"train": "training", "valid": "validation"}[part])
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure

# %%
class LiveCurves:
    """For `fit(on_epoch=...)` in a notebook: the curves and the latest validation masks, redrawn in place after every epoch."""

    def __init__(self):
        self._handles = []

    def __call__(self, history: Sequence[dict], picture: np.ndarray | None) -> None:
        from IPython.display import Image, display

        curves = io.BytesIO()
        draw_curves(history).savefig(curves)
        shown = [Image(data=curves.getvalue())]
        if picture is not None:
            shown.append(Image(data=cv2.imencode(".png", picture[..., ::-1])[1].tobytes()))
        if len(self._handles) < len(shown):
            self._handles = [display(item, display_id=True) for item in shown]
        else:
            for handle, item in zip(self._handles, shown):
                handle.update(item)

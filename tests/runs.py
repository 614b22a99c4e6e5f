"""Runs of the trainer on a small tiny folder, as the command or on the harness's ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from soar_mega import train as command_line
from soar_mega.checkpoint import store
from soar_mega.checkpoint.boxes import BoxedTensor
from soar_mega.checkpoint.torch_arrays import DTYPES
from soar_mega.config import Config, load_config
from soar_mega.data.tiny import digits
from soar_mega.data.tiny.pipeline import TinySizes, make_tiny, write_shards
from soar_mega.launch.environment import ProcessEnvironment
from soar_mega.launch.signals import Signals
from soar_mega.launch.watchdog import Watchdog
from soar_mega.parallel.layout import layout_of, local_slice, real_part
from soar_mega.parallel.mesh import Mesh
from soar_mega.telemetry.metrics import read_metrics
from soar_mega.training import trainer
from soar_mega.training.setup import Run, build, check
from soar_mega.training.step import Stepper

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = TinySizes(
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=8,
    dual_attention_layers=(0,),
    pos_embed_max_size=12,
)
TRAIN, FEW, HELD_OUT = 48, 20, 16

# Everything SOAR has, in few passes: a stochastic path, groups that do not divide the states.
SMALL_SOAR = (
    "objective.num_rollout_paths=2",
    "objective.trajectory_length=2",
    "objective.aux_group_size=3",
)
OBJECTIVES = {
    "pretrain": ("pretrain", ()),
    "sft": ("sft", ()),
    "soar": ("soar", SMALL_SOAR),
}


@dataclass(frozen=True)
class Tiny:
    """``sd35``, and shards of 48 (``train``), 20 (``few``) and 16 (``heldout``) pictures."""

    folder: Path

    @property
    def pretrained(self) -> Path:
        """The diffusers folder."""
        return self.folder / "sd35"

    def shards(self, prefix: str) -> str:
        """Glob of the shards of a prefix."""
        return str(self.folder / "shards" / f"{prefix}-*.tar")

    def arguments(self, objective: str, run_dir: Path, *overrides: str) -> list[str]:
        """Of ``python -m soar_mega.train``; ``objective`` is a key of ``OBJECTIVES``."""
        name, more = OBJECTIVES[objective]
        return [
            str(REPOSITORY / "configs" / f"tiny_{name}.yaml"),
            f"model.pretrained={self.pretrained}",
            f"data.shards={self.shards('train')}",
            f"run.dir={run_dir}",
            *more,
            *overrides,
        ]

    def config(self, objective: str, run_dir: Path, *overrides: str) -> Config:
        """The same, loaded."""
        path, *rest = self.arguments(objective, run_dir, *overrides)
        return load_config(path, rest)


def make_small_tiny(folder: Path, sizes: TinySizes = SIZES) -> Tiny:
    """Write the folder; a few seconds."""
    make_tiny(folder, train_pictures=TRAIN, held_out_pictures=HELD_OUT, sizes=sizes)
    scenes = digits.training_scenes(FEW, 1)
    pictures = digits.draw_many(scenes, digits.load_scans("generator"), 1)
    write_shards(folder / "shards", "few", scenes, pictures, pictures_per_shard=FEW // 2)
    return Tiny(folder)


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def command(arguments: list[str]) -> int:
    """``python -m soar_mega.train`` in this process; its exit code."""
    with _torch_settings_kept():
        return command_line.main(arguments)


def place() -> ProcessEnvironment:
    """This process in the default group, or alone."""
    if not dist.is_initialized():
        return ProcessEnvironment.read({})
    rank, size = dist.get_rank(), dist.get_world_size()
    return ProcessEnvironment(rank, size, rank, size, "127.0.0.1", 29500, "torchrun")


def start(config: Config) -> Run:
    """A run ready for its next step, on the processes of the default group."""
    return build(config, check(config, place()), torch.device("cpu"))


def train(config: Config, begun: Callable[[Run], None] | None = None) -> None:
    """What the command does after its process group is there.

    ``begun`` may look at the run before its first step.
    """
    with _torch_settings_kept():
        torch.use_deterministic_algorithms(config.run.deterministic)
        run = start(config)
        try:
            if begun is not None:
                begun(run)
            with Watchdog(config.watchdog, Path(config.run.dir), run.mesh.rank) as watchdog:
                trainer._loop(run, place(), Signals(), watchdog)
        finally:
            run.feed.close()


class Killed(BaseException):
    """Ends a run as a kill does: no handler of ours knows it."""


@contextmanager
def killed_in_step(number: int) -> Iterator[None]:
    """Runs inside die in their step ``number`` (from 1), after its data was loaded."""
    original = Stepper.run

    def dying(self: Stepper, step: int, *rest: Any) -> dict[str, float]:
        if step == number - 1:
            raise Killed
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stepper, "run", dying)
        yield


def checkpoint(run_dir: Path, step: int) -> Path:
    """The checkpoint's folder."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def state(path: Path) -> dict[str, Tensor]:
    """Every global tensor of a checkpoint: weights, EMA and Adam's moments."""
    reader = store.StateReader(path)
    tensors = {
        name: torch.empty(shape, dtype=DTYPES[reader.dtypes[name]])
        for name, shape in reader.shapes.items()
    }
    whole = {name: BoxedTensor.whole(tensor) for name, tensor in tensors.items()}
    store.load(path, whole, Mesh.single())
    return tensors


def assert_same_state(left: Path, right: Path) -> None:
    """Two checkpoints hold the same bits."""
    one, other = state(left), state(right)
    assert one.keys() == other.keys()
    kinds = {name.split(".")[0] for name in one}
    assert kinds - {"fp8"} == {"model", "ema", "optimizer"}
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def assert_weights(run: Run, tensors: dict[str, Tensor], kind: str) -> None:
    """The model computes with these global tensors, bit for bit."""
    for stage in run.stepper.stages:
        for name, parameter in stage.named_parameters():
            layout, expected = layout_of(parameter), torch.zeros_like(parameter.data)
            own = tensors[f"{kind}.{name}"][local_slice(layout, run.mesh)]
            real_part(expected, layout, run.mesh).copy_(own)
            assert torch.equal(parameter.data, expected), name


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what a clock measured."""
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/")}
        for line in read_metrics(run_dir)
    ]


def assert_nothing_written(run_dir: Path) -> None:
    """No run began there; that the folder can be written to may have been tried out."""
    assert not run_dir.exists() or not list(run_dir.iterdir())


def losses(run_dir: Path) -> list[float]:
    """The training loss of every step."""
    return [line["train/loss"] for line in metrics(run_dir)]


def trainer_record(path: Path) -> dict[str, Any]:
    """``trainer.json`` of a checkpoint."""
    record: dict[str, Any] = json.loads((path / "trainer.json").read_text())
    return record


def copy_checkpoint(source: Path, run_dir: Path) -> Path:
    """A run folder that holds nothing but this checkpoint."""
    target = run_dir / "checkpoints" / source.name
    shutil.copytree(source, target)
    return target

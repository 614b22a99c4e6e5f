"""The stages of one pipeline rank on the meta device, and what can be counted on them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from soar_mega.config import Config
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.payload import PassSize
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.layout import layout_of
from soar_mega.parallel.mesh import Mesh
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.actions import Schedule
from soar_mega.training.plan_stages import GpuBackend, PassCosts, measure_pass
from soar_mega.training.setup import DTYPES


class RankStages:
    """The stages of one pipeline rank, on the meta device.

    Attributes:
        stages: Stage number -> the stage.
        flat: Their flat buffers.
    """

    def __init__(
        self,
        config: Config,
        architecture: MMDiTConfig,
        layers: dict[int, range],
        mesh: Mesh,
        size: PassSize,
    ) -> None:
        self.size = size
        self.stages = {
            number: MMDiTStage(
                architecture,
                mesh,
                GpuBackend(),
                layers=own,
                sequence_parallel=config.parallel.sequence_parallel,
                activation_checkpointing=config.train.activation_checkpointing,
            )
            for number, own in layers.items()
        }
        self._modules = nn.ModuleList(self.stages.values())
        self.flat = ShardedParameters(
            self._modules,
            mesh,
            DTYPES[config.precision.compute_dtype],
            DTYPES[config.precision.grad_reduce_dtype],
        )
        self._costs: dict[tuple[int, int, bool], PassCosts] = {}

    def costs(self, stage: int, states: int = 1, *, grad: bool = True) -> PassCosts:
        """Of a pass of so many states through a stage."""
        key = stage, states, grad
        if key not in self._costs:
            size = self.size._replace(rows=self.size.rows * states)
            self._costs[key] = measure_pass(self.stages[stage], size, grad=grad)
        return self._costs[key]

    @property
    def parameters(self) -> int:
        """Of the whole model, whatever the tensor-parallel size."""
        return sum(math.prod(layout_of(p).global_shape) for p in self._modules.parameters())

    @property
    def local_parameters(self) -> int:
        """On each GPU."""
        return sum(p.numel() for p in self._modules.parameters())

    @property
    def partial_bytes(self) -> int:
        """Gradients that are summed over the tensor ranks at the end of a step."""
        partial = (p for p in self._modules.parameters() if layout_of(p).gradient == "partial")
        return sum(p.numel() for p in partial) * self.flat.master_dtype.itemsize

    @property
    def position_bytes(self) -> int:
        """The position table, where the embeddings are."""
        return sum(buffer.nbytes for buffer in self._modules.buffers())

    def payload_bytes(self, states: int = 1) -> int:
        """Of the message from one stage to the next."""
        rows, *others = self.size
        shapes = next(iter(self.stages.values())).payload_shapes(rows * states, *others)
        return shapes.numel * self.flat.dtype.itemsize


def rank_stages(
    config: Config,
    architecture: MMDiTConfig,
    schedule: Schedule,
    layers: tuple[range, ...],
    size: PassSize,
    data_size: int,
) -> Iterator[RankStages]:
    """Every pipeline rank's stages; one tensor and data rank stands for all.

    Args:
        schedule: Which rank owns which stage.
        layers: Of each stage.
        size: Of a pass with one state.
        data_size: Data-parallel size.
    """
    place, tensor = schedule.step.placement, config.parallel.tensor_model_parallel_size
    world = tensor * data_size * place.ranks
    for rank in range(place.ranks):
        bare = Mesh(0, world, 0, tensor, 0, data_size, None, None, None, torch.device("meta"))
        own = [place.stage(rank, chunk) for chunk in range(place.chunks)]
        yield RankStages(config, architecture, {s: layers[s] for s in own}, bare, size)

"""Times, which are modelled: GPUs by name, from NVIDIA's data sheets, and what a schedule's actions
take on one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from soar_mega.config import Config, ConfigError
from soar_mega.model.config import MMDiTConfig
from soar_mega.pipeline.actions import Kind, Schedule
from soar_mega.pipeline.simulator import Costs
from soar_mega.pipeline.stages import stage_cost
from soar_mega.telemetry.flops import known_peak_tflops, layer_costs
from soar_mega.training.plan_rank import RankStages

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One GPU of an HGX or DGX node of eight.

    Attributes:
        memory: In GB of 10^9 bytes.
        fp32_tflops: Peak without tensor cores.
        nvlink, network: GB/s in one direction, within a node and between nodes.
    """

    name: str
    memory: float
    fp32_tflops: float
    nvlink: float
    network: float

    def peak_tflops(self, dtype: torch.dtype) -> float:
        """Dense peak in the compute dtype."""
        bf16 = known_peak_tflops(self.name)
        assert bf16 is not None
        return bf16 if dtype == torch.bfloat16 else self.fp32_tflops

    def link(self, ranks: int) -> tuple[str, float]:
        """Name and GB/s of what neighbours in a block of ``ranks`` consecutive ranks talk over."""
        inside = ranks <= GPUS_PER_NODE
        return ("NVLink", self.nvlink) if inside else ("network", self.network)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 19.5, 300, 25),
        Gpu("H100", 80, 67, 450, 50),
        Gpu("H200", 141, 67, 450, 50),
        Gpu("B200", 180, 75, 900, 50),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: No such GPU.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu = {name} is not in the table: use one of {', '.join(GPUS)}")
    return GPUS[name]


def modelled_costs(
    config: Config,
    architecture: MMDiTConfig,
    schedule: Schedule,
    layers: tuple[range, ...],
    ranks: tuple[RankStages, ...],
    gpu: Gpu,
    efficiency: float,
    gpus: int,
) -> Costs:
    """Seconds of every action: FLOPs at a share of the peak, bytes at the rate of their link.

    A backward's halves take as long as a forward each, recomputation apart.

    Args:
        schedule: What is to be timed.
        layers: Of each stage.
        ranks: The stages by pipeline rank, for the bytes that tensor-parallel peers exchange.
        efficiency: Share of the peak.
        gpus: Of the whole run.
    """
    place, tensor = schedule.step.placement, config.parallel.tensor_model_parallel_size
    size = ranks[0].size
    image_tokens = size.height * size.width // architecture.patch_size**2
    flops = layer_costs(architecture, image_tokens, size.text_length)
    rate = gpu.peak_tflops(ranks[0].flat.dtype) * 1e12 * efficiency * tensor
    nvlink = gpu.link(tensor)[1] * 1e9
    measured = {}
    for stage, own in enumerate(layers):
        sent = ranks[place.rank(stage)].costs(stage)
        compute = stage_cost(own, *flops) * size.rows / rate
        again = compute if config.train.activation_checkpointing == "full" else 0.0
        forward = compute + sent.forward_sent / nvlink
        inputs = compute + again + sent.backward_sent / nvlink
        for kind in {p.kind for p in schedule.step.passes}:
            measured[Kind.FORWARD, kind, stage] = forward
            measured[Kind.BACKWARD, kind, stage] = inputs + compute
            measured[Kind.INPUT_BACKWARD, kind, stage] = inputs
            measured[Kind.WEIGHT_BACKWARD, kind, stage] = compute
    latency = ranks[0].payload_bytes() / (gpu.link(gpus)[1] * 1e9)
    return Costs(measured=measured, latency=latency, unit="s")

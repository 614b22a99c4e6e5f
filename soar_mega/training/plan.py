"""What a configuration would need and take on so many GPUs, without starting anything.

Counted: parameters, memory, FLOPs and bytes, by building each rank's stages on the meta device and
simulating the schedule. Modelled: times, from FLOPs at a share of the GPU's peak and from bytes at
its links' data-sheet rates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from soar_mega import hub
from soar_mega.checkpoint.weight_sources import read_transformer_config
from soar_mega.config import Config, ConfigError
from soar_mega.config.data import RESOLUTION_STEP
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.payload import PassSize
from soar_mega.objectives import make_objective
from soar_mega.passes import Pass
from soar_mega.pipeline.actions import Channel, Kind
from soar_mega.pipeline.schedules import build_schedule
from soar_mega.pipeline.simulator import simulate
from soar_mega.pipeline.timeline import Timeline
from soar_mega.telemetry.flops import (
    forward_flops,
    model_flops_utilisation,
    training_factor,
)
from soar_mega.training import plan_memory
from soar_mega.training.layout import cut_model
from soar_mega.training.plan_layouts import checked_data_size
from soar_mega.training.plan_memory import RankMemory
from soar_mega.training.plan_rank import RankStages, rank_stages
from soar_mega.training.plan_times import Gpu, modelled_costs
from soar_mega.training.setup import DTYPES, check_resolution

EFFICIENCY = 0.4
# The VAE's; with the model's patches of 2 it makes RESOLUTION_STEP.
_LATENT_STEP = RESOLUTION_STEP // 2


@dataclass(frozen=True)
class Traffic:
    """Messages of a step on one link of the pipeline; bytes of one tensor rank."""

    channel: Channel
    source: int
    target: int
    messages: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A layout's needs. Bytes are per GPU, times in seconds, both of one step.

    Attributes:
        config, architecture, gpus, gpu, efficiency: What was asked for.
        size: Of a pass with one state.
        data_size, microbatches: Ranks a sample's step is shared by, and microbatches of each.
        passes: Of each microbatch.
        ranks: The stages by pipeline rank.
        layers: The layers by stage.
        timeline, even_timeline: The schedule with modelled times; with equal stages.
        encoders: Bytes of each frozen model found.
    """

    config: Config
    architecture: MMDiTConfig
    gpus: int
    gpu: Gpu
    efficiency: float
    size: PassSize
    data_size: int
    microbatches: int
    passes: tuple[Pass, ...]
    ranks: tuple[RankStages, ...]
    layers: tuple[range, ...]
    timeline: Timeline
    even_timeline: Timeline
    encoders: dict[str, int]

    @property
    def tensor_size(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def image_tokens(self) -> int:
        return self.size.height * self.size.width // self.architecture.patch_size**2

    @property
    def forward_flops(self) -> int:
        """Of one sample."""
        return forward_flops(self.architecture, self.image_tokens, self.size.text_length)

    @property
    def flops(self) -> int:
        """Of a step over all GPUs: the model's own, without recomputation."""
        factor = training_factor(self.config.objective)
        return factor * self.forward_flops * self.config.train.global_batch_size

    def stage_numbers(self, rank: int) -> list[int]:
        """Stages of a pipeline rank."""
        return list(self.ranks[rank].stages)

    @property
    def split(self) -> bool:
        """Whether the schedule does weight gradients apart from input gradients."""
        return any(e.action.kind is Kind.INPUT_BACKWARD for e in self.timeline.events[0])

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """By pipeline rank."""
        return tuple(self._memory(rank) for rank in self.timeline.ranks)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within the GPU's memory."""
        return max(memory.peak for memory in self.memory) <= self.gpu.memory * 1e9

    def _memory(self, rank: int) -> RankMemory:
        own = self.ranks[rank]
        largest = max(p.states for p in self.passes)
        buffers = self.timeline.receive_buffers[rank]
        sends = any(e.action.kind is Kind.SEND for e in self.timeline.events[rank])
        costs = [own.costs(s, p.states, grad=p.grad) for s in own.stages for p in self.passes]
        return RankMemory(
            **plan_memory.states(own.flat),
            position=own.position_bytes,
            encoders=sum(self.encoders.values()),
            activations=plan_memory.peak_activations(self.timeline, rank, own.costs),
            working=max(cost.split_working if self.split else cost.working for cost in costs),
            buffers=(buffers + sends) * own.payload_bytes(largest),
        )

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """What the pipeline sends in a step."""
        messages: Counter[tuple[Channel, int, int]] = Counter()
        volume: Counter[tuple[Channel, int, int]] = Counter()
        for rank, events in enumerate(self.timeline.events):
            for action in (e.action for e in events if e.action.kind is Kind.SEND):
                assert action.channel is not None and action.peer is not None
                link = action.channel, rank, action.peer
                states = self.timeline.step.by_name[action.pass_name].states
                messages[link] += 1
                volume[link] += (
                    self.hand_over_bytes
                    if action.channel is Channel.HAND_OVER
                    else self.ranks[rank].payload_bytes(states)
                )
        return tuple(Traffic(*link, messages[link], volume[link]) for link in sorted(messages))

    @property
    def hand_over_bytes(self) -> int:
        """Of the guided velocity of a microbatch; 0 where no pass waits for it."""
        if not self.timeline.step.awaited:
            return 0
        elements = self.size.rows * self.architecture.out_channels
        elements *= self.size.height * self.size.width
        return elements * self.ranks[0].flat.dtype.itemsize

    def tensor_sent(self, rank: int) -> float:
        """Bytes a GPU sends to its tensor-parallel peers."""
        own = self.ranks[rank]
        sent = 0.0
        for p in self.passes:
            for stage in own.stages:
                costs = own.costs(stage, p.states, grad=p.grad)
                sent += self.microbatches * (costs.forward_sent + costs.backward_sent)
        return sent + self._partial_sent(rank)

    def _partial_sent(self, rank: int) -> float:
        return 2 * _share(self.tensor_size) * self.ranks[rank].partial_bytes

    def reduce_sent(self, rank: int) -> float:
        """Bytes a GPU sends in the reduce-scatter of gradients over data-parallel ranks."""
        flat = self.ranks[rank].flat
        return _share(self.data_size) * flat.total_size * flat.reduce_dtype.itemsize

    def gather_sent(self, rank: int) -> float:
        """Bytes a GPU sends in the all-gather of weights over data-parallel ranks."""
        flat = self.ranks[rank].flat
        return _share(self.data_size) * flat.total_size * flat.dtype.itemsize

    def link(self, group: str) -> tuple[str, float]:
        """Name and GB/s of what ``tensor``, ``data`` or ``pipeline`` neighbours talk over."""
        inner = {"tensor": 1, "data": self.data_size, "pipeline": self.gpus // self.tensor_size}
        return self.gpu.link(self.tensor_size * inner[group])

    @property
    def end_times(self) -> dict[str, float]:
        """Seconds of what follows the last backward: sums of gradients and gather of weights."""
        return {
            "tensor_reduce": max(map(self._partial_sent, self.timeline.ranks))
            / (self.link("tensor")[1] * 1e9),
            "data_reduce": max(map(self.reduce_sent, self.timeline.ranks))
            / (self.link("data")[1] * 1e9),
            "data_gather": max(map(self.gather_sent, self.timeline.ranks))
            / (self.link("data")[1] * 1e9),
        }

    @property
    def step_time(self) -> float:
        """Seconds of a step."""
        return self.timeline.makespan + sum(self.end_times.values())

    @property
    def samples_per_s(self) -> float:
        """Over all GPUs."""
        return self.config.train.global_batch_size / self.step_time

    @property
    def utilisation(self) -> float:
        """Share of the GPUs' peak, 0 to 1."""
        return model_flops_utilisation(
            self.samples_per_s,
            self.flops / self.config.train.global_batch_size,
            self.gpus,
            self.gpu.peak_tflops(self.ranks[0].flat.dtype),
        )


def make_plan(config: Config, gpus: int, gpu: Gpu, efficiency: float = EFFICIENCY) -> Plan:
    """Work a layout out.

    Args:
        config: The configuration; of ``model.pretrained`` only ``transformer/config.json`` has to
            be there; of a hub model no weights are downloaded.
        gpus: Processes of the run, one a GPU.
        gpu: Whose memory and rates count.
        efficiency: Share of the peak at which FLOPs are done, 0 to 1.

    Raises:
        ConfigError, ValueError: The layout, the model folder or an argument cannot work.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus = {gpus} must be at least 1")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency = {efficiency} must be above 0 and at most 1")
    parallel = config.parallel
    pretrained = hub.resolve(config.model.source, setting="model.pretrained", weights=False)
    architecture = MMDiTConfig.from_diffusers(read_transformer_config(pretrained))
    data_size = checked_data_size(config, architecture, gpus)
    check_resolution(config.data, architecture)
    side = config.data.resolution // _LATENT_STEP
    text = plan_memory.text_tokens(pretrained, config.data.max_sequence_length)
    size = PassSize(config.train.micro_batch_size, side, side, text)
    image_tokens = side * side // architecture.patch_size**2
    layers = cut_model(config, architecture, image_tokens, text)
    microbatches = config.train.global_batch_size // (data_size * size.rows)
    passes = make_objective(config.objective, shift=config.objective.shift or 1.0, seed=0).passes()
    schedule = build_schedule(
        parallel.pipeline_schedule,
        passes,
        ranks=parallel.pipeline_model_parallel_size,
        microbatches=microbatches,
        virtual=parallel.virtual_pipeline_model_parallel_size,
    )
    ranks = tuple(rank_stages(config, architecture, schedule, layers, size, data_size))
    costs = modelled_costs(config, architecture, schedule, layers, ranks, gpu, efficiency, gpus)
    dtype = DTYPES[config.precision.compute_dtype]
    return Plan(
        config,
        architecture,
        gpus,
        gpu,
        efficiency,
        size,
        data_size,
        microbatches,
        passes,
        ranks,
        layers,
        simulate(schedule, costs),
        simulate(schedule),
        plan_memory.encoder_bytes(pretrained, dtype),
    )


def _share(size: int) -> float:
    """What a rank of a ring sends in a gather or a reduce-scatter, of the whole."""
    return (size - 1) / size

"""Bytes that one rank needs: states of the optimizer, activations by schedule, frozen encoders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.parallel.sharded import ShardedParameters
from soar_mega.pipeline.actions import Kind
from soar_mega.pipeline.timeline import Timeline
from soar_mega.training.plan_stages import PassCosts

_CLIP_TOKENS = 77
_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each GPU of a pipeline rank.

    Attributes:
        weights: In the compute dtype.
        gradients: ``main_grad``, fp32.
        master: fp32 weights, this data-parallel rank's share; in fp32 part of ``weights``, so 0.
        adam: Both moments, its share.
        ema: Averaged weights, its share.
        position: The position table, on the rank with the embeddings.
        encoders: Frozen VAE and text encoders.
        activations: Most that is kept for backwards at any moment of the schedule.
        working: Most that one forward or backward needs besides.
        buffers: Payloads received early and not taken yet, and one being sent.
        reduction: Copies made by the reduction of gradients and the gather of weights; at the end
            of the step, when activations and buffers are gone.
    """

    weights: int
    gradients: int
    master: int
    adam: int
    ema: int
    position: int
    encoders: int
    activations: int
    working: int
    buffers: int
    reduction: int

    @property
    def always(self) -> int:
        """What is there all the time."""
        states = self.weights + self.gradients + self.master + self.adam + self.ema
        return states + self.position + self.encoders

    @property
    def peak(self) -> int:
        """The most at any moment of a step."""
        return self.always + max(self.activations + self.working + self.buffers, self.reduction)

    def as_dict(self) -> dict[str, int]:
        """The parts and their ``peak``, ready for JSON."""
        return {**asdict(self), "peak": self.peak}


def states(parameters: ShardedParameters) -> dict[str, int]:
    """The parts of ``RankMemory`` that depend on a rank's parameters and layout alone."""
    total, share = parameters.total_size, parameters.shard_size
    master = parameters.master_dtype.itemsize
    compute, reduce = parameters.dtype.itemsize, parameters.reduce_dtype.itemsize
    reduction = 0
    if parameters.mesh.data_size > 1:
        reduction = share * reduce
        if parameters.reduce_dtype != parameters.master_dtype:
            reduction += total * reduce + share * master
        reduction = max(reduction, share * (master + compute))  # the gradient's share stays
    return {
        "weights": total * compute,
        "gradients": total * master,
        "master": 0 if parameters.dtype == parameters.master_dtype else share * master,
        "adam": 2 * share * master,
        "ema": share * master,
        "reduction": reduction,
    }


def peak_activations(timeline: Timeline, rank: int, costs: Callable[[int, int], PassCosts]) -> int:
    """Most bytes that a rank keeps for its backwards at any moment.

    A microbatch counts ``kept`` from its forward to its backward; where backwards are split, from
    the input gradient to the weight gradient it counts ``held``.

    Args:
        timeline: The step.
        rank: Pipeline rank.
        costs: (stage, states of the pass) -> of a pass with gradient.
    """
    step, live, peak = timeline.step, 0, 0
    for event in timeline.compute(rank):
        p = step.by_name[event.action.pass_name]
        if not p.grad:
            continue
        cost = costs(step.placement.stage(rank, event.action.chunk), p.states)
        live += {
            Kind.FORWARD: cost.kept,
            Kind.BACKWARD: -cost.kept,
            Kind.INPUT_BACKWARD: cost.held - cost.kept,
            Kind.WEIGHT_BACKWARD: -cost.held,
        }[event.action.kind]
        peak = max(peak, live)
    return peak


def encoder_bytes(folder: Path | str, dtype: torch.dtype) -> dict[str, int]:
    """Memory of each frozen model that lies in a diffusers folder, from its files' headers.

    Args:
        folder: ``model.pretrained``.
        dtype: Of the text encoders; the VAE is loaded in fp32.

    Raises:
        CheckpointError: A file that is no safetensors file, or a missing one.
    """
    found = {}
    for part in _ENCODERS:
        files = _files(Path(folder).expanduser() / part)
        if files:
            size = 4 if part == "vae" else dtype.itemsize
            found[part] = size * sum(map(_elements, files))
    return found


def _files(folder: Path) -> list[Path]:
    """The weights that ``from_pretrained`` loads; other variants lie beside them."""
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is damaged: {error!r}") from error
            return [folder / name for name in sorted(names)]
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    return []


def _elements(path: Path) -> int:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        return sum(math.prod(entry["shape"]) for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error!r}") from error


def text_tokens(folder: Path | str, max_sequence_length: int) -> int:
    """Text tokens of a sample: those of the CLIPs, and T5's, which are zeros where there is no T5.

    Args:
        folder: ``model.pretrained``; 77 CLIP tokens where it has no tokenizer.
        max_sequence_length: ``data.max_sequence_length``.
    """
    path = Path(folder).expanduser() / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return _CLIP_TOKENS + max_sequence_length
    length = json.loads(path.read_text()).get("model_max_length", _CLIP_TOKENS)
    return int(length) + max_sequence_length

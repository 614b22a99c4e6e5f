"""A plan as text for people and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import fill
from typing import Any

from soar_mega.training.plan import Plan

# Columns of the memory table: heading, parts of ``RankMemory``.
_COLUMNS = (
    ("weights", ("weights",)),
    ("gradients", ("gradients",)),
    ("optimizer", ("master", "adam", "ema")),
    ("position", ("position",)),
    ("encoders", ("encoders",)),
    ("activations", ("activations",)),
    ("working", ("working",)),
    ("buffers", ("buffers",)),
    ("reduction", ("reduction",)),
    ("peak", ("peak",)),
)


def summary(plan: Plan) -> dict[str, Any]:
    """Everything the table says, ready for JSON; bytes per GPU, times in seconds of a step."""
    parallel, step, ranks = plan.config.parallel, plan.timeline.step, plan.timeline.ranks
    return {
        "gpus": plan.gpus,
        "gpu": asdict(plan.gpu),
        "efficiency": plan.efficiency,
        "fits": plan.fits,
        "layout": {
            "tensor": plan.tensor_size,
            "sequence_parallel": parallel.sequence_parallel and plan.tensor_size > 1,
            "pipeline": parallel.pipeline_model_parallel_size,
            "virtual": step.placement.chunks,
            "data": plan.data_size,
            "schedule": parallel.pipeline_schedule,
            "layers": [len(layers) for layers in plan.layers],
        },
        "microbatches": plan.microbatches,
        "passes": [asdict(p) for p in plan.passes],
        "image_tokens": plan.image_tokens,
        "text_tokens": plan.size.text_length,
        "parameters": sum(rank.parameters for rank in plan.ranks),
        "forward_flops": plan.forward_flops,
        "step_flops": plan.flops,
        "bubble": plan.timeline.bubble,
        "bubble_equal_stages": plan.even_timeline.bubble,
        "ranks": [
            {
                "rank": rank,
                "stages": [
                    {"stage": s, "layers": [plan.layers[s].start, plan.layers[s].stop]}
                    for s in plan.stage_numbers(rank)
                ],
                "parameters": plan.ranks[rank].parameters,
                "local_parameters": plan.ranks[rank].local_parameters,
                "memory_bytes": plan.memory[rank].as_dict(),
                "busy_s": plan.timeline.busy[rank],
                "idle": plan.timeline.rank_bubbles[rank],
                "tensor_sent_bytes": plan.tensor_sent(rank),
                "reduce_sent_bytes": plan.reduce_sent(rank),
                "gather_sent_bytes": plan.gather_sent(rank),
            }
            for rank in ranks
        ],
        "encoder_bytes": plan.encoders,
        "payload_bytes": plan.ranks[0].payload_bytes(),
        "hand_over_bytes": plan.hand_over_bytes,
        "links": {group: plan.link(group) for group in ("tensor", "data", "pipeline")},
        "pipeline_traffic": [asdict(traffic) for traffic in plan.traffic],
        "times_s": {
            "passes": plan.timeline.makespan,
            **plan.end_times,
            "step": plan.step_time,
        },
        "samples_per_s": plan.samples_per_s,
        "utilisation": plan.utilisation,
        "notes": notes(plan),
    }


def table(plan: Plan) -> str:
    """The plan as text."""
    parts = [_head(plan), _memory(plan), _communication(plan), _time(plan)]
    parts.append(
        "\n".join(fill(x, 100, subsequent_indent="  ", break_on_hyphens=False) for x in notes(plan))
    )
    return "\n\n".join(parts)


def notes(plan: Plan) -> list[str]:
    """What the numbers mean and what they leave out."""
    found = []
    if plan.encoders:
        names = ", ".join(f"{k} {_gb(v)}" for k, v in plan.encoders.items())
        found.append(f"Frozen encoders, on every GPU, in GB: {names}.")
    else:
        found.append(
            "The VAE and the text encoders are left out: model.pretrained has no weights of them."
        )
    found.append(
        "Memory is counted on the model's own operations with a GPU's kernels. Left out: the CUDA "
        "context, the allocator's gaps, kernels' and NCCL's own buffers, the batch and its text."
    )
    if plan.config.precision.backend == "te":
        found.append(
            "precision.backend = te is counted and timed as torch's kernels in bf16: FP8's copies "
            "of weights and inputs, padded tokens and faster products are left out."
        )
    if plan.split:
        found.append(
            "Between input and weight gradients a microbatch keeps the input of every linear, "
            "recomputed or not, and the gradient of its output."
        )
    if len(plan.ranks) > 1:
        found.append(
            "Every message between stages is timed as that of one state, although auxiliary passes "
            "with objective.aux_group_size states send that many times as much, and only one "
            "outgoing buffer is counted."
        )
    found.append(
        f"Times are modelled, not measured: FLOPs at {plan.efficiency:g} of the peak "
        "(--efficiency), bytes at the links' data-sheet rates; tensor-parallel collectives and the "
        "gradients' reduction are not overlapped. Left out: encoding, optimizer, loading."
    )
    return found


def _head(plan: Plan) -> str:
    config, step = plan.config, plan.timeline.step
    parallel, train = config.parallel, config.train
    worst = max(plan.timeline.ranks, key=lambda rank: plan.memory[rank].peak)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    pipeline = parallel.pipeline_model_parallel_size
    where = f" on pipeline rank {worst}" if pipeline > 1 else ""
    layout = f"data {plan.data_size} x pipeline {pipeline} x tensor {plan.tensor_size}"
    if parallel.sequence_parallel and plan.tensor_size > 1:
        layout += ", sequence parallel"
    if pipeline > 1:
        stages = _count(step.placement.chunks, "stage")
        layout += f"; {parallel.pipeline_schedule}, {stages} a rank"
    names = [
        f"{len(group)} {kind}" if len(group) > 1 else kind
        for kind, group in ((k, list(g)) for k, g in groupby(plan.passes, lambda p: p.kind))
    ]
    bubble = f"{plan.timeline.bubble:.1%}"
    if pipeline > 1:
        bubble += f" ({plan.even_timeline.bubble:.1%} with equal stages)"
    parameters = sum(rank.parameters for rank in plan.ranks)
    recompute = train.activation_checkpointing
    rows = [
        (
            "memory",
            f"{verdict}: peak {_gb(plan.memory[worst].peak)} of {plan.gpu.memory:g} GB{where}",
        ),
        (
            "model",
            f"{parameters:,} parameters, {plan.architecture.num_layers} layers; "
            f"{plan.image_tokens} image + {plan.size.text_length} text tokens",
        ),
        ("layout", layout),
        (
            "step",
            f"{_count(train.global_batch_size, 'sample')}: {plan.data_size} data x "
            f"{_count(plan.microbatches, 'microbatch')} of {plan.size.rows}; passes: "
            f"{', '.join(names)}; recomputation: {recompute}",
        ),
        (
            "FLOPs",
            f"{plan.flops / 1e12:,.1f} TFLOP a step, {plan.forward_flops / 1e12:.3f} a forward of "
            "one sample",
        ),
        ("bubble", bubble),
        (
            "speed",
            f"{plan.step_time:.3g} s a step, {plan.samples_per_s:.3g} samples/s, "
            f"{plan.utilisation:.1%} of the peak (modelled)",
        ),
    ]
    title = f"{_count(plan.gpus, plan.gpu.name)}, {config.model.pretrained}"
    return "\n".join([title, *(f"  {name:<8}{text}" for name, text in rows)])


def _memory(plan: Plan) -> str:
    shown = [
        (heading, keys)
        for heading, keys in _COLUMNS
        if any(m.as_dict()[key] for m in plan.memory for key in keys)
    ]
    lines = [["rank", "layers", "parameters", *(heading for heading, _ in shown)]]
    for rank, memory in enumerate(plan.memory):
        layers = [plan.layers[stage] for stage in plan.stage_numbers(rank)]
        lines.append(
            [
                str(rank),
                " ".join(f"{x.start}-{x.stop - 1}" for x in layers),
                f"{plan.ranks[rank].parameters / 1e6:,.1f} M",
                *(_gb(sum(memory.as_dict()[key] for key in keys)) for _, keys in shown),
            ]
        )
    title = "Memory of each GPU of a pipeline rank in GB (10^9 bytes)"
    return "\n".join([title, *_aligned(lines)])


def _communication(plan: Plan) -> str:
    lines = [["what", "over", "a message", "a step"]]
    ranks = plan.timeline.ranks
    for channel, group in groupby(plan.traffic, lambda x: x.channel):
        links = list(group)
        busiest = max(links, key=lambda x: x.bytes)
        lines.append(
            [
                f"pipeline {channel.replace('_', '-')}",
                plan.link("pipeline")[0],
                _mb(busiest.bytes / busiest.messages),
                f"{_mb(busiest.bytes)} (rank {busiest.source} to {busiest.target}, "
                f"{_count(busiest.messages, 'message')})",
            ]
        )
    for group_name, what, sent in (
        ("tensor", "tensor-parallel sums", plan.tensor_sent),
        ("data", "gradients, reduce-scatter", plan.reduce_sent),
        ("data", "weights, all-gather", plan.gather_sent),
    ):
        rank = max(ranks, key=sent)
        if sent(rank):
            where = f" (pipeline rank {rank})" if len(ranks) > 1 else ""
            lines.append([what, plan.link(group_name)[0], "", f"{_mb(sent(rank))}{where}"])
    if len(lines) == 1:
        return "Communication: none"
    title = "Communication: most that one GPU sends"
    return "\n".join([title, *_aligned(lines, left=4)])


def _time(plan: Plan) -> str:
    names = {
        "passes": "passes, bubble included",
        "tensor_reduce": "sum of gradients over tensor ranks",
        "data_reduce": "reduce-scatter of gradients",
        "data_gather": "all-gather of weights",
    }
    times = {"passes": plan.timeline.makespan, **plan.end_times}
    rows = [(times[key], text) for key, text in names.items() if times[key]]
    rows.append((plan.step_time, "step"))
    title = f"Time of a step in ms, modelled for {plan.gpu.name} at {plan.efficiency:.0%} of peak"
    return "\n".join([title, *(f"  {1e3 * time:>9,.1f}  {text}" for time, text in rows)])


def _aligned(lines: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Columns padded to one width; the first ``left`` to the left, the last as it is."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        cells = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rows.append("  " + "  ".join(cells).rstrip())
    return rows


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f}"


def _mb(number: float) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"


def _count(number: int, what: str) -> str:
    if what.isupper() or what[-1].isdigit():
        return f"{number} x {what}"
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"

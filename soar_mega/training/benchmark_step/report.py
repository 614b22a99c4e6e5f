"""Tables of a record, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_GIB = 2**30


def bounds(record: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, float]:
    """Samples/s that our side cannot pass: by what -> how many.

    FP8 passes them, as they are of the load's own number format.
    """
    factor = next((s["factor"] for s in table["sides"] if s["variant"]["side"] == "ours"), None)
    if factor is None:
        factor = table["sides"][0]["factor"]
    rates = {
        "peak of the data sheet": record["peak_tflops"],
        "speed of large matrix products": record["matrix_tflops"],
    }
    work = factor * table["forward_tflop"]
    return {name: rate / work for name, rate in rates.items() if rate is not None}


def title(table: Mapping[str, Any]) -> str:
    """What was computed."""
    load = table["load"]
    words = {"sft": "SFT", "soar": f"SOAR with N = {load['trajectory_length']}"}[load["objective"]]
    size = load["latent_size"]
    return (
        f"{load['name']}, {words}, microbatches of {table['micro_batch_size']}, {load['dtype']}, "
        f"latents {size} x {size}"
    )


def subtitle(table: Mapping[str, Any]) -> str:
    """Of the model, and whose work a step includes."""
    optimizer = "with AdamW" if table["load"]["optimizer"] else "without optimizer"
    count = table["parameters"]
    size = f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
    return (
        f"{size} parameters, a forward of a sample is {table['forward_tflop']:.4g} TFLOP, "
        f"{optimizer} on both sides"
    )


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a record."""
    machine = record["hardware"]
    yield f"{machine.get('gpu', machine['cpu'])}, torch {record['versions']['torch']}; medians"
    for table in record["tables"]:
        yield ""
        yield title(table)
        yield subtitle(table)
        yield (
            f"{'':<37}{'samples/s':>10}{'model':>9}{'':>7}{'+peak':>8}{'total':>8}"
            f"{'to the reference':>18}{'same recomputed':>18}"
        )
        yield (
            f"  {'':<32}{'k':>3}{'a device':>10}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>8}{'GiB':>8}"
            f"{'speed  memory':>18}{'speed  memory':>18}"
        )
        yield from map(_row, table["sides"])
        for name, samples in bounds(record, table).items():
            yield f"  {'bound: ' + name:<35}{samples:>10.4g}"


def _row(side: Mapping[str, Any]) -> str:
    head = f"  {side['label']:<32}{side['factor']:>3}"
    if "failed" in side:
        return f"{head}  failed: {side['failed']}"
    if "median" not in side:
        return f"{head}  not measured"
    median = side["median"]
    mfu = "" if median["mfu"] is None else f"{median['mfu']:.1%}"
    total = median["total_peak_bytes"]
    row = (
        f"{head}{median['samples_per_s']:>10.4g}{median['model_tflops']:>9.3g}{mfu:>7}"
        f"{median['peak_growth_bytes'] / _GIB:>8.2f}"
        f"{'' if total is None else f'{total / _GIB:.2f}':>8}"
    )
    for name in ("as published", "same recomputation"):
        ratio = side["ratios"].get(name)
        row += f"{'':>18}" if ratio is None else f"{_pair(ratio):>18}"
    return row.rstrip()


def _pair(ratio: Mapping[str, float | None]) -> str:
    memory = "" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
    return f"{ratio['speed']:.2f}x  {memory:>6}"

"""Training on data with faults: the run goes on, nobody else's randomness moves, every rank agrees.

What two processes do is done in one start of them, whose imports take most of the time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from soar_mega.data.errors import DataError
from soar_mega.data.shards.index import scan_shard
from soar_mega.data.shards.shard import DATA_OFFSET
from soar_mega.training.step import Stepper
from tests.distributed.harness import run_ranks
from tests.runs import (
    Tiny,
    assert_same_state,
    checkpoint,
    command,
    losses,
    metrics,
    state,
    train,
)
from tests.training_data import (
    Slot,
    bad_lines,
    corpus,
    keys_of,
    only_differ_in,
    plain_cases,
    recorded,
    refusal,
    write_cases,
)
from tests.unit.test_data_index import write_tar

CASES = corpus()
BAD = {key: case.kind for key, case in CASES.items() if case.kind}
# Every step has each sample once.
ALL = (f"train.global_batch_size={len(CASES)}", "logging.sample_ids=true", "data.max_bad_rate=1")
EVERY_STEP = ("checkpoint.checkpointing_steps=1", "checkpoint.checkpoints_total_limit=10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``odd/*.tar``, ``whole/*.tar`` (their twins), ``mixed/*.tar`` (one shard all bad) and
    ``uneven/*.tar`` (of 7, 1, 0 and, as its end is missing, 2 samples)."""
    root = tmp_path_factory.mktemp("sets")
    names = list(CASES)
    for part in (0, 1):
        some = {key: CASES[key] for key in names[part::2]}
        write_cases(root / "odd" / f"{part}.tar", some)
        write_cases(root / "whole" / f"{part}.tar", some, whole=True)
    write_cases(root / "mixed" / "good.tar", plain_cases(8))
    bad = {key: case._replace(image=("png", b"")) for key, case in plain_cases(8, 8).items()}
    write_cases(root / "mixed" / "bad.tar", bad)
    for number, (count, first) in enumerate([(7, 0), (1, 7), (0, 8), (3, 8)]):
        write_cases(root / "uneven" / f"{number}.tar", plain_cases(count, first))
    last = scan_shard(str(root / "uneven" / "3.tar"))
    os.truncate(last.path, int(last.table[2, DATA_OFFSET]) + 100)
    return root


def shards(folder: Path, name: str) -> str:
    return f"data.shards={folder}/{name}/*.tar"


@dataclass(frozen=True)
class OnTwo:
    """Run folders of two processes, and what each process returned, by name."""

    folder: Path
    ranks: list[dict[str, Any]]


@contextmanager
def in_step(number: int, action: Any) -> Iterator[None]:
    """``action()`` before step ``number`` (from 1) is computed, its data being loaded."""
    original = Stepper.run

    def run(self: Stepper, step: int, *rest: Any) -> dict[str, float]:
        if step == number - 1:
            action()
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "run", run)
        yield


def work_on_two(tiny: Tiny, sets: Path, folder: Path) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, size, micro in (("tensor", 2, 4), ("data", 1, 2)):
        layout = (
            f"parallel.tensor_model_parallel_size={size}",
            f"train.micro_batch_size={micro}",
            "train.max_train_steps=1",
        )
        with recorded() as steps:
            train(tiny.config("pretrain", folder / name, shards(sets, "odd"), *ALL, *layout))
        done[name] = steps
    for name, more in STOPPED.items():
        config = tiny.config("pretrain", folder / name, shards(sets, "odd"), *ALL[:2], *more)
        done[name] = refusal(config)
    mixed = tiny.config("pretrain", folder / "mixed", *mixed_overrides(sets))
    train(mixed)
    uneven = tiny.config("pretrain", folder / "uneven", *uneven_overrides(sets))
    train(uneven)
    return done


@pytest.fixture(scope="module")
def on_two(tiny: Tiny, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OnTwo:
    runs = tmp_path_factory.mktemp("on_two")
    return OnTwo(runs, run_ranks(2, work_on_two, tiny, folder, runs))


# --- Bad samples among good ones.


def run_recorded(
    tiny: Tiny, folder: Path, run_dir: Path, decoder: str, name: str
) -> list[dict[int, Slot]]:
    more = (f"data.decoder={decoder}", "train.micro_batch_size=4", "train.max_train_steps=2")
    config = tiny.config("pretrain", run_dir, shards(folder, name), *ALL, *more)
    with recorded() as steps:
        train(config)
    return steps


@pytest.fixture(scope="module")
def with_pil(
    tiny: Tiny, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[int, Slot]]]:
    run_dir = tmp_path_factory.mktemp("pil")
    return run_dir, run_recorded(tiny, folder, run_dir, "pil", "odd")


def bad_slots(run_dir: Path) -> set[int]:
    return {slot for slot, key in keys_of(run_dir)[1].items() if key in BAD}


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_bad_samples_touch_nobody_else(
    decoder: str,
    tiny: Tiny,
    folder: Path,
    with_pil: tuple[Path, list[dict[int, Slot]]],
    tmp_path: Path,
) -> None:
    odd_dir, odd = with_pil
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
        odd_dir = tmp_path / "odd"
        odd = run_recorded(tiny, folder, odd_dir, decoder, "odd")
        # DALI has done something: it resizes a little differently.
        assert any(
            not torch.equal(one.clean_CHW, other.clean_CHW)
            for one, other in zip(odd[0].values(), with_pil[1][0].values(), strict=True)
        )
    whole = run_recorded(tiny, folder, tmp_path / "whole", decoder, "whole")
    assert keys_of(odd_dir) == keys_of(tmp_path / "whole")

    listed = [(step, key, BAD[key]) for step in (1, 2) for key in sorted(BAD)]
    assert bad_lines(odd_dir) == listed and bad_lines(tmp_path / "whole") == []
    lines = metrics(odd_dir)
    assert [line["data/bad_samples"] for line in lines] == [len(BAD), 2 * len(BAD)]
    assert all(math.isfinite(line["train/loss"]) for line in lines)

    bad = bad_slots(odd_dir)
    assert len(bad) == len(BAD)
    assert [slot for slot, one in sorted(odd[0].items()) if not one.weight] == sorted(bad)
    # In the second step the weights differ, as others were learnt from; the latents do not.
    only_differ_in(odd[0], whole[0], bad)
    again = {slot for slot, key in keys_of(odd_dir)[2].items() if key in BAD}
    for slot in odd[1].keys() - again:
        assert torch.equal(odd[1][slot].clean_CHW, whole[1][slot].clean_CHW)
    good = [one for slot, one in whole[0].items() if slot not in bad]
    expected = sum(one.loss for one in good) / sum(one.counted for one in good)
    assert lines[0]["train/loss"] == pytest.approx(expected, rel=1e-12)
    # No black picture stands in for one that failed: all are different ones.
    latents_GCHW = torch.stack([one.clean_CHW for one in good])
    distances_GG = torch.cdist(latents_GCHW.flatten(1), latents_GCHW.flatten(1))
    assert distances_GG.fill_diagonal_(math.inf).min() > 1


def test_bad_samples_on_two_processes(
    on_two: OnTwo, with_pil: tuple[Path, list[dict[int, Slot]]]
) -> None:
    run_dir, (alone, _) = with_pil
    for name in ("tensor", "data"):
        found = on_two.folder / name
        assert bad_lines(found) == [line for line in bad_lines(run_dir) if line[0] == 1]
        assert keys_of(found)[1] == keys_of(run_dir)[1]
        assert losses(found)[0] == pytest.approx(losses(run_dir)[0], rel=1e-5)
        assert metrics(found)[0]["data/bad_samples"] == len(BAD)
        parts = [rank[name][0] for rank in on_two.ranks]
        together = parts[0] | parts[1]
        assert together.keys() == alone.keys()
        for slot, one in together.items():
            assert one.weight == alone[slot].weight
            if one.weight:
                assert torch.equal(one.clean_CHW, alone[slot].clean_CHW)


# --- The rate at which a run stops. 7 of 20 samples are bad, and 10 may be at a rate of 1 %.

STOPPED = {
    "at once": ("data.max_bad_rate=0", "train.max_train_steps=3"),
    "in the second step": ("data.max_bad_rate=0.01", "train.max_train_steps=3", *EVERY_STEP),
}


def test_too_many_stop_every_rank(on_two: OnTwo, tiny: Tiny, folder: Path) -> None:
    messages = [rank["at once"] for rank in on_two.ranks]
    assert messages[0] == messages[1]
    for word in (
        "data.max_bad_rate = 0: 7 of the run's 20 samples",
        "3 not an image",
        "1 caption not UTF-8",
        str(on_two.folder / "at once" / "bad_samples"),
        "tools/inspect_data.py --verify",
    ):
        assert word in messages[0]
    assert metrics(on_two.folder / "at once") == []

    messages = [rank["in the second step"] for rank in on_two.ranks]
    assert messages[0] == messages[1] and "14 of the run's 40 samples" in messages[0]
    assert len(metrics(on_two.folder / "in the second step")) == 1


def test_counts_survive_a_resume(
    on_two: OnTwo, tiny: Tiny, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them 7 would be few enough for one step more."""
    run_dir = on_two.folder / "in the second step"
    arguments = tiny.arguments(
        "pretrain",
        run_dir,
        shards(folder, "odd"),
        *ALL[:2],
        *STOPPED["in the second step"],
        "checkpoint.resume=latest",
    )
    assert command(arguments) == 93
    assert "14 of the run's 40 samples" in capsys.readouterr().err
    assert command([*arguments, "data.max_bad_rate=0.02"]) == 93
    assert "21 of the run's 60 samples" in capsys.readouterr().err
    assert command([*arguments, "data.max_bad_rate=0.021"]) == 0
    assert metrics(run_dir)[-1]["data/bad_samples"] == 21


# --- Steps without any usable sample.


def mixed_overrides(folder: Path) -> list[str]:
    """A window is a shard, so that every second step or so is of bad samples alone."""
    more = ("data.shuffle_shards=1", "train.max_train_steps=4", "data.max_bad_rate=1")
    return [shards(folder, "mixed"), *more, *EVERY_STEP]


def test_a_step_of_bad_samples_learns_nothing(
    on_two: OnTwo, tiny: Tiny, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config("pretrain", tmp_path, *mixed_overrides(folder)))
    lines = metrics(tmp_path)
    idle = [line["step"] for line in lines if "train/loss" not in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and len(idle) == 2
    assert lines[-1]["data/bad_samples"] == 16
    assert f"step {idle[0]}: no sample of it can be used" in capsys.readouterr().out
    for step in (2, 3, 4):
        before, after = checkpoint(tmp_path, step - 1), checkpoint(tmp_path, step)
        if step in idle:
            assert_same_state(before, after)
        else:
            one, other = state(before), state(after)
            assert any(not torch.equal(one[name], other[name]) for name in one)
    two = metrics(on_two.folder / "mixed")
    assert [line["step"] for line in two if "train/loss" not in line] == idle
    learnt = [[line["train/loss"] for line in run if "train/loss" in line] for run in (lines, two)]
    assert learnt[0] == pytest.approx(learnt[1], rel=1e-5)


# --- Shards that change under a run.


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_shard_lost_under_the_run(how: str, tiny: Tiny, tmp_path: Path) -> None:
    for number in (0, 1):
        write_cases(tmp_path / "set" / f"{number}.tar", plain_cases(8, 8 * number))
    tar = tmp_path / "set" / "1.tar"
    cut = tar.stat().st_size // 2

    def lose() -> None:
        tar.unlink() if how == "gone" else os.truncate(tar, cut)

    more = ("train.max_train_steps=4", "data.num_workers=0", "logging.sample_ids=true")
    arguments = [f"data.shards={tmp_path}/set/*.tar", *more]
    with in_step(2, lose):  # after the first epoch's last step was loaded
        train(tiny.config("pretrain", tmp_path / "run", *arguments, "data.max_bad_rate=1"))
    lines, listed = metrics(tmp_path / "run"), bad_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["data/bad_samples"] == 0 and lines[3]["data/bad_samples"] == len(listed)
    keys = {key for _, key, _ in listed}
    assert {kind for _, _, kind in listed} == {"unreadable"} and min(listed)[0] > 2
    assert keys <= {f"s{number:03d}" for number in range(8, 16)}
    assert len(keys) == 8 if how == "gone" else "s008" not in keys and "s015" in keys

    if how == "gone":
        write_cases(tar, plain_cases(8, 8))
        with in_step(2, lose), pytest.raises(DataError, match=r"data\.max_bad_rate.*unreadable"):
            train(tiny.config("pretrain", tmp_path / "strict", *arguments, "data.max_bad_rate=0"))


def test_a_shard_that_comes_back_is_read_though_samples_are_cached(
    tiny: Tiny, tmp_path: Path
) -> None:
    """What could not be read is not kept: two steps an epoch, the shard is away in the second."""
    for number in (0, 1):
        write_cases(tmp_path / "set" / f"{number}.tar", plain_cases(8, 8 * number))
    tar, away = tmp_path / "set" / "1.tar", tmp_path / "away"
    more = ("train.max_train_steps=6", "data.num_workers=0", "data.prefetch_steps=1")
    arguments = [f"data.shards={tmp_path}/set/*.tar", *more, "data.max_bad_rate=1"]
    config = tiny.config("pretrain", tmp_path / "run", *arguments, "data.cache_encoded=true")
    with in_step(1, lambda: tar.rename(away)), in_step(2, lambda: away.rename(tar)):
        train(config)
    counts = [line["data/bad_samples"] for line in metrics(tmp_path / "run")]
    assert counts[0] == 0 < counts[1] and counts[3] == counts[5]


# --- Shards in odd numbers and sizes.


def uneven_overrides(folder: Path) -> list[str]:
    """10 samples, of one shard an epoch almost all, for 2 ranks with 4 threads each."""
    more = ("data.num_workers=4", "train.max_train_steps=3", "logging.sample_ids=true")
    return [shards(folder, "uneven"), *more, "train.global_batch_size=4", "data.shuffle_shards=1"]


def test_uneven_empty_and_cut_shards(
    on_two: OnTwo, tiny: Tiny, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.config("pretrain", tmp_path, *uneven_overrides(folder)))
    assert "not used of the shards: 1 tar cut short" in capsys.readouterr().out
    found = keys_of(tmp_path)
    drawn = [key for step in (1, 2, 3) for _, key in sorted(found[step].items())]
    assert sorted(drawn[:10]) == [f"s{number:03d}" for number in range(10)]
    assert keys_of(on_two.folder / "uneven") == found
    assert losses(on_two.folder / "uneven") == pytest.approx(losses(tmp_path), rel=1e-5)


def test_a_stale_index_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_cases(tmp_path / "set" / "0.tar", plain_cases(2))
    record = {"version": 1, "size": tar.stat().st_size, "samples": []}
    Path(f"{tar}.index.json").write_text(json.dumps(record))
    write_tar(tar, [("a.png", b"x"), ("a.txt", b"x" * 20_000)])
    assert command(tiny.arguments("pretrain", tmp_path / "run", f"data.shards={tar}")) == 78
    message = capsys.readouterr().err
    for word in ("0.tar.index.json", "stale", "Make it again", "delete it"):
        assert word in message
    assert not (tmp_path / "run").exists()

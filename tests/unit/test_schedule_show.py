"""The tool that shows a schedule: numbers, pictures and traces."""

from __future__ import annotations

import json
import runpy
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from soar_mega.pipeline.schedules import SCHEDULES, build_schedule
from soar_mega.pipeline.simulator import Costs, simulate
from soar_mega.pipeline.timeline import Timeline
from soar_mega.pipeline.timeline_picture import draw, pass_colours
from soar_mega.pipeline.trace import write_trace
from tests.unit.schedule_cases import soar_passes

FLOW = ("--objective", "flow_matching", "--schedule", "1f1b", "--json")
TOOL = Path(__file__).parents[2] / "tools" / "show_schedule.py"


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *flags])
        runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_json_has_the_numbers(show: Any) -> None:
    flags = "--pipeline 8 --microbatches 8 --objective soar --trajectory-length 6"
    out = json.loads(show(*flags.split(), "--schedule", "interleaved_1f1b", "--json"))
    assert out["makespan"] == 186.5
    assert out["work"] == 176
    assert out["bubble"] == pytest.approx(1 - 176 / 186.5)
    assert out["peak_live_microbatches"][0] == out["live_bound"] == 11.5
    assert len(out["peak_live_microbatches"]) == 8
    out = json.loads(show("--pipeline", "2", "--microbatches", "3", *FLOW))
    assert out["work"] == 9


def test_table_has_a_line_a_rank(show: Any) -> None:
    lines = show("--pipeline", "4", "--microbatches", "8", "--schedule", "zero_bubble").splitlines()
    assert "makespan 179 units, work 176, bubble 1.68%" in lines[0]
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "3"]
    assert lines[3].split()[1:5] == ["176", "1.68%", "4", "4"]


def test_recorded_step_beside_its_simulation(show: Any, tmp_path: Path) -> None:
    """A step whose weight gradients took twice as long, and whose last rank dawdled at the end."""
    schedule = build_schedule("zero_bubble", soar_passes(), ranks=3, microbatches=2)
    line = simulate(schedule, Costs(weight_backward=2.0, unit="s"))
    late = line.events[2][-1]
    slow = (*line.events[2][:-1], replace(late, start=late.start + 50, end=late.end + 50))
    real, trace = tmp_path / "real.json", tmp_path / "trace.json"
    replace(line, events=(*line.events[:2], slow)).save(real)
    picture = tmp_path / "real.svg"
    flags = ("--recorded", str(real), "--picture", str(picture), "--trace", str(trace), "--json")
    out = json.loads(show(*flags))
    assert out["unit"] == "s" and out["pipeline"] == 3
    assert out["simulated"]["makespan"] == line.makespan
    assert out["makespan"] == pytest.approx(max(late.end + 50 - line.start, line.makespan))
    assert "a real step" in picture.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}


def test_needs_a_layout_or_a_recorded_step(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        show("--pipeline", "2")
    assert "--microbatches" in capsys.readouterr().err


def test_settings_of_the_objective_change_the_passes(show: Any) -> None:
    def work(*flags: str) -> float:
        return json.loads(show("--pipeline", "2", "--microbatches", "1", "--json", *flags))["work"]

    few = ("--trajectory-length", "2")
    assert work(*few) == 3 + 1 + 6
    assert work(*few, "--no-reuse-base-forward") == 3 + 2 + 6
    assert work(*few, "--cfg-scale-sampling", "1") == 3 + 6
    assert work(*few, "--num-rollout-paths", "3") == 3 + 1 + 18
    slow = ("--cost-forward", "2", "--cost-weight-backward", "0.5")
    assert work(*few, *slow) == 3 * 3.5 + 2


def test_mistakes_end_with_a_sentence(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (("--virtual-stages", "3"), "which takes 2"),
        (("--picture", "a.gif"), "must end in .png or .svg"),
    ):
        with pytest.raises(SystemExit):
            show("--pipeline", "2", "--microbatches", "2", "--schedule", "zero_bubble_v", *flags)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", SCHEDULES)
def test_pictures_show_every_rank_and_pass(name: str, tmp_path: Path) -> None:
    schedule = build_schedule(name, soar_passes(2), ranks=3, microbatches=2)
    timeline = simulate(schedule)
    draw(timeline, tmp_path / "a.svg", "<title & more>", schedule.live_bound)
    root = ET.parse(tmp_path / "a.svg").getroot()
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"rank 0", "rank 2", "base", "rollout", "aux0", "aux1", "<title & more>"} <= words
    cells = sum(len(list(timeline.compute(rank))) for rank in timeline.ranks)
    assert sum(element.tag.endswith("rect") for element in root.iter()) > cells
    draw(timeline, tmp_path / "a.png", "a title", schedule.live_bound)
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        seen = {colour for _, colour in picture.getcolors(1 << 24)}
    assert set(pass_colours(timeline).values()) <= seen


def test_trace_loads_and_its_slices_are_the_timeline(tmp_path: Path) -> None:
    schedule = build_schedule("zero_bubble", soar_passes(2), ranks=3, microbatches=4)
    timeline = simulate(schedule)
    recorded = Timeline("recorded", timeline.step, timeline.events, unit="s")
    write_trace(tmp_path / "trace.json", [timeline, recorded])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "zero_bubble",
        "recorded",
    }
    for process, factor in ((0, 1e3), (1, 1e6)):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert sum(e["dur"] for e in slices) == pytest.approx(sum(timeline.busy) * factor)
        assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(timeline.makespan * factor)
        live = [e["args"]["live"] for e in events if e["ph"] == "C" and e["pid"] == process]
        assert max(live) == max(timeline.peak_live)
    starts, ends = ([e["id"] for e in events if e["ph"] == phase] for phase in "sf")
    sends = sum(a.kind == "send" for rank in schedule.actions for a in rank)
    assert sorted(starts) == sorted(ends)
    assert len(set(starts)) == 2 * sends


def test_a_timeline_survives_its_file(tmp_path: Path) -> None:
    timeline = simulate(build_schedule("zero_bubble_v", soar_passes(3), ranks=2, microbatches=3))
    timeline.save(tmp_path / "timeline.json")
    assert Timeline.load(tmp_path / "timeline.json") == timeline

"""Draws a timeline: a lane per rank, passes in colours, what each rank keeps below its lane."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from soar_mega.pipeline.actions import RELEASES, Channel, Kind
from soar_mega.pipeline.timeline import Event, Timeline
from soar_mega.pipeline.timeline_canvas import LETTER, Canvas, Colour, make_canvas, mix

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
INK, FAINT, LANE = (31, 41, 55), (107, 114, 128), (209, 214, 222)
KEPT, BOUND = (172, 183, 199), (225, 130, 150)
BASE = (37, 99, 176)
ROLLOUTS = ((16, 145, 120), (94, 175, 90))
# The auxiliary passes run through these, from the first to the last.
AUX = ((245, 178, 66), (226, 106, 72), (196, 56, 108), (118, 52, 148))
SHADES = {
    Kind.FORWARD: (WHITE, 0.0),
    Kind.BACKWARD: (BLACK, 0.3),
    Kind.INPUT_BACKWARD: (BLACK, 0.3),
    Kind.WEIGHT_BACKWARD: (WHITE, 0.55),
}

LEFT, RIGHT, TOP = 64.0, 148.0, 84.0
LANE_HEIGHT, CHUNK_HEIGHT, KEPT_HEIGHT, GAP = 22.0, 14.0, 11.0, 8.0


def draw(timeline: Timeline, path: Path, title: str, live_bound: Fraction | None = None) -> None:
    """Write a picture of a timeline.

    Args:
        timeline: Simulated or recorded.
        path: Ends in ``.png`` or ``.svg``.
        title: First line of the picture.
        live_bound: Drawn over what each rank keeps.

    Raises:
        ValueError: Another ending.
    """
    durations = sorted(e.end - e.start for rank in timeline.ranks for e in timeline.compute(rank))
    short = max(durations[len(durations) // 10], timeline.makespan / 400)
    plot = min(max(900.0, 13.0 * timeline.makespan / short), 2000.0)
    chunks = timeline.step.placement.chunks
    lane = LANE_HEIGHT if chunks == 1 else CHUNK_HEIGHT * chunks
    bottom = TOP + (lane + KEPT_HEIGHT + GAP) * len(timeline.events)
    canvas = make_canvas(path, LEFT + plot + RIGHT, bottom + 34 + 46)
    picture = _Picture(canvas, timeline, plot, lane, live_bound)
    picture.head(title)
    for rank in timeline.ranks:
        picture.lane(rank)
    picture.hand_overs()
    picture.axis(bottom)
    picture.legend(bottom + 42)
    canvas.save(path)


def pass_colours(timeline: Timeline) -> dict[str, Colour]:
    """A colour for each pass, by name."""
    passes = timeline.step.passes
    rollouts = [p.name for p in passes if p.kind == "rollout"]
    others = [p.name for p in passes if p.kind not in ("rollout", "base")]
    colours = {p.name: BASE for p in passes if p.kind == "base"}
    colours |= {name: ROLLOUTS[at % len(ROLLOUTS)] for at, name in enumerate(rollouts)}
    for at, name in enumerate(others):
        place = at / max(1, len(others) - 1) * (len(AUX) - 1)
        low = min(int(place), len(AUX) - 2)
        colours[name] = mix(AUX[low], AUX[low + 1], place - low)
    return colours


class _Picture:
    def __init__(
        self,
        canvas: Canvas,
        timeline: Timeline,
        plot: float,
        lane: float,
        live_bound: Fraction | None,
    ) -> None:
        self.canvas, self.timeline, self.plot, self.height = canvas, timeline, plot, lane
        self.row = lane + KEPT_HEIGHT + GAP
        self.chunks = timeline.step.placement.chunks
        self.colours = pass_colours(timeline)
        self.bound = live_bound
        peak = max(timeline.peak_live)
        self.full = max(peak, live_bound or peak)

    def x(self, time: float) -> float:
        return LEFT + (time - self.timeline.start) / self.timeline.makespan * self.plot

    def head(self, title: str) -> None:
        line, text = self.timeline, self.canvas.text
        text(LEFT, 24, title, 17, INK)
        unit = f" {line.unit}" if line.unit != "units" else ""
        text(
            LEFT,
            46,
            f"bubble {line.bubble:.2%}   makespan {line.makespan:.5g}{unit}   work {line.work:.5g}"
            f"{unit}   keeps at most {float(max(line.peak_live)):g} microbatches a rank",
            12,
            FAINT,
        )
        right = LEFT + self.plot
        text(right + 66, TOP - 14, "bubble", 10, FAINT, "right")
        text(right + 128, TOP - 14, "peak live", 10, FAINT, "right")

    def lane(self, rank: int) -> None:
        top, canvas, line = TOP + rank * self.row, self.canvas, self.timeline
        middle = top + self.height / 2
        canvas.text(LEFT - 10, middle, f"rank {rank}", 11, INK, "right")
        canvas.rect(LEFT, top, self.plot, self.height, LANE)
        for event in line.compute(rank):
            self.cell(event, top)
        self.kept(rank, top + self.height + 1)
        right = LEFT + self.plot
        canvas.text(right + 66, middle, f"{line.rank_bubbles[rank]:.1%}", 11, INK, "right")
        live = f"{float(line.peak_live[rank]):.3g}"
        if self.bound is not None:
            live += f" / {float(self.bound):.3g}"
        canvas.text(right + 128, middle, live, 11, INK, "right")

    def cell(self, event: Event, top: float) -> None:
        action, canvas = event.action, self.canvas
        left, right = self.x(event.start), self.x(event.end)
        colour = mix(self.colours[action.pass_name], *SHADES[action.kind])
        gap = 0.5 if right - left > 2.5 else 0.0
        if self.chunks > 1:
            # The rank is busy; with which of its chunks, the strong colour says.
            canvas.rect(left, top, right - left - gap, self.height, mix(colour, WHITE, 0.82))
        height = self.height / self.chunks
        top += action.chunk * height
        canvas.rect(left, top, right - left - gap, height, colour)
        number = str(action.microbatch)
        size = min(9.5, (right - left - 1) / (LETTER * len(number) + 0.15))
        if size >= 5:
            bright = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour, strict=True)) > 150
            shown = INK if bright else WHITE
            canvas.text((left + right) / 2, top + height / 2, number, size, shown, "middle")

    def kept(self, rank: int, top: float) -> None:
        """Live microbatches over time, as a step curve on a line."""
        step, base = self.timeline.step, top + KEPT_HEIGHT
        live, since = Fraction(0), self.timeline.start
        if self.bound is not None:
            y = base - float(self.bound / self.full) * KEPT_HEIGHT
            self.canvas.line(LEFT, y, LEFT + self.plot, y, BOUND)

        def bar(until: float) -> None:
            height = float(live / self.full) * KEPT_HEIGHT
            if height > 0 and until > since:
                left = self.x(since)
                self.canvas.rect(left, base - height, self.x(until) - left, height, KEPT)

        for event in self.timeline.compute(rank):
            p = step.by_name[event.action.pass_name]
            share = Fraction(p.states, step.placement.chunks)
            if event.action.kind is Kind.FORWARD and p.grad:
                bar(event.start)
                live, since = live + share, event.start
            elif event.action.kind in RELEASES:
                bar(event.end)
                live, since = live - share, event.end

    def hand_overs(self) -> None:
        """Triangles where a hand-over leaves the last rank and where it reaches the first."""
        ranks = len(self.timeline.events)
        for event in self.timeline.events[-1]:
            if event.action.kind is Kind.SEND and event.action.channel is Channel.HAND_OVER:
                low = TOP + (ranks - 1) * self.row + self.height
                self.triangle(self.x(event.end), low, 4)
                self.triangle(self.x(event.end), TOP - 5, 4)

    def triangle(self, x: float, y: float, size: float) -> None:
        """Pointing down, its upper side at ``y``."""
        half = 0.7 * size
        self.canvas.polygon([(x - half, y), (x + half, y), (x, y + size)], INK)

    def axis(self, top: float) -> None:
        span = self.timeline.makespan
        step = next(
            step
            for power in range(-9, 12)
            for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
            if span / step <= self.plot / 60
        )
        for at in range(int(span / step + 1e-9) + 1):
            x = LEFT + at * step / span * self.plot
            self.canvas.line(x, top, x, top + 4, FAINT)
            label = f"{at * step:.6g}"
            if at == 0 and self.timeline.unit != "units":
                label = f"0 {self.timeline.unit}"
            self.canvas.text(x, top + 12, label, 10, FAINT, "middle")

    def legend(self, top: float) -> None:
        """Passes in the first row; kinds of action, and marks, in the second."""
        passes = [([colour], name) for name, colour in self.colours.items()]
        if len(passes) > 16:
            passes[8:-4] = [([], "...")]
        self.entries(passes, top)
        kinds = {e.action.kind for rank in self.timeline.ranks for e in self.timeline.compute(rank)}
        graded = [BASE, *AUX[:2]]
        entries = [
            (
                [
                    mix(colour, *shade)
                    for colour in (graded if kind is not Kind.FORWARD else [ROLLOUTS[0], *graded])
                ],
                kind.replace("_", " "),
            )
            for kind, shade in SHADES.items()
            if kind in kinds
        ]
        end = self.entries([*entries, ([KEPT], "microbatches kept")], top + 20)
        if self.bound is not None:
            self.canvas.line(end, top + 20, end + 12, top + 20, BOUND)
            self.canvas.text(end + 17, top + 20, "their bound", 11, INK)
            end += 17 + 11 * LETTER * 11 + 16
        if self.chunks > 1:
            self.canvas.rect(end, top + 15, 12, 11, mix(BASE, WHITE, 0.82))
            self.canvas.rect(end, top + 15, 12, 11 / self.chunks, BASE)
            words = "first chunk above, last below"
            self.canvas.text(end + 17, top + 20, words, 11, INK)
            end += 17 + len(words) * LETTER * 11 + 16
        if any(e.action.channel is Channel.HAND_OVER for e in self.timeline.events[-1]):
            self.triangle(end + 5, top + 17, 6)
            self.canvas.text(end + 17, top + 20, "hand-over, last rank to first", 11, INK)

    def entries(self, entries: Sequence[tuple[list[Colour], str]], y: float) -> float:
        """Coloured boxes with their words; returns where the next entry could begin."""
        x = LEFT
        for colours, words in entries:
            width = 12.0 if len(colours) == 1 else 6.0
            for colour in colours:
                self.canvas.rect(x, y - 5, width, 11, colour)
                x += width
            x += 5
            self.canvas.text(x, y, words, 11, INK)
            x += LETTER * 11 * len(words) + 16
        return x

"""The picture of an exposure bias report: six panels, a colour a model, bands of 95 %."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#2563b0", "#d9552b", "#10917a", "#8a3fa0", "#a87b00", "#475569")
_FAINT, _GRID = "#6b7280", "#e5e7eb"
_BAND = 1.96  # standard errors of a 95 % interval
_SIZE, _DPI = (13.0, 7.6), 110


def plot(found: Mapping[str, Any], path: Path | str) -> None:
    """Draw ``exposure_report.report``'s result.

    Args:
        found: With at most six models.
        path: A file of a kind that matplotlib's Agg backend writes, such as png.

    Raises:
        ValueError: More models than can be told apart.
        ImportError: matplotlib is not installed.
    """
    # Optional; its object-oriented interface leaves no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if len(found["models"]) > len(_COLOURS):
        raise ValueError(f"{len(found['models'])} models: at most {len(_COLOURS)} in one picture")
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = _Panels(figure, found)
    panels.excursions()
    panels.whole_way()
    entries = [
        Line2D([], [], color=colour, linewidth=2.5, label=label)
        for label, colour in zip(found["models"], _COLOURS, strict=False)
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
    guidance = f"guidance {found['guidance_scale']:g}"
    figure.suptitle(
        f"Exposure bias: {found['samples']} held-out samples, {found['steps']} sampling steps, "
        f"{guidance if found['guidance_scale'] > 1 else 'no guidance'}; bands: 95 %",
        fontsize=12,
    )
    figure.savefig(path)


class _Panels:
    """Draws the curves; ``found`` as ``exposure_report.report`` gives it."""

    def __init__(self, figure: Any, found: Mapping[str, Any]) -> None:
        self._axes = figure.subplots(2, 3).flat
        self._models = found["models"]
        self._times = [1000 * sigma for sigma in found["sigmas"]]
        horizons = [str(j) for j in found["horizons"]]
        self._short, self._long = horizons[0], horizons[-1]

    def excursions(self) -> None:
        """The upper row: a few steps from ideal states."""
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        short, long = _steps(self._short), _steps(self._long)
        unit = "RMS, latent units"
        lengths = {"-": f"after {long}", ":": f"after {short}"}
        axes = self._panel("Drift of the state from the ideal path", f"distance, {unit}")
        for colour, model in self._each():
            self._draw(axes, colour, model["drift"][self._long], "-")
            self._draw(axes, colour, model["drift"][self._short], ":")
        axes.set_ylim(bottom=0)
        _styles(axes, lengths, "upper left")
        axes = self._panel("Error of the conditional velocity", f"distance, {unit}")
        axes.set_yscale("log")  # the velocity that leads back has no bound as sigma falls
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        for colour, model in self._each():
            self._draw(axes, colour, model["own_error"][self._long], "-")
            self._draw(axes, colour, model["ideal_error"], "--")
        _styles(axes, {"-": f"own states, after {long}", "--": "ideal states"}, "upper left")
        title = "Exposure gap: own states less ideal states"
        axes = self._panel(title, "sigma x difference of RMS errors")
        axes.axhline(0, color=_FAINT, linewidth=0.8)
        for colour, model in self._each():
            self._draw(axes, colour, model["gap"][self._long], "-")
            self._draw(axes, colour, model["gap"][self._short], ":")
        _styles(axes, lengths, "upper left")

    def whole_way(self) -> None:
        """The lower row: from pure noise."""
        axes = self._panel("From noise: norm of the state", "ratio to ideal states of the level")
        axes.axhline(1, color=_FAINT, linewidth=0.8)
        for colour, model in self._each():
            self._draw(axes, colour, model["state_norm"], "-")
        axes = self._panel("From noise: norm of the clean estimate", "ratio to real latents")
        axes.axhline(1, color=_FAINT, linewidth=0.8)
        for colour, model in self._each():
            self._draw(axes, colour, model["clean_norm"], "-")
            self._draw(axes, colour, model["ideal_clean_norm"], "--")
        styles = {"-": "own states, the sampler's", "--": "ideal states, no guidance"}
        _styles(axes, styles, "lower right")
        title = "From noise: distance of the channels' law"
        axes = self._panel(title, "Frechet distance, RMS, latent units")
        for colour, model in self._each():
            self._draw(axes, colour, model["law_distance"], "-")
        axes.set_ylim(bottom=0)

    def _each(self) -> list[tuple[str, Any]]:
        return list(zip(_COLOURS, self._models.values(), strict=False))

    def _panel(self, title: str, ylabel: str) -> Any:
        axes = next(self._axes)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel("timestep (1000 = noise, 0 = picture)", fontsize=9)
        axes.set_ylabel(ylabel, fontsize=9)
        axes.set_xlim(1000, 0)  # as time runs when sampling
        axes.grid(color=_GRID, linewidth=0.8)
        axes.tick_params(labelsize=8.5, colors=_FAINT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        return axes

    def _draw(self, axes: Any, colour: str, curve: Mapping[str, list[Any]], style: str) -> None:
        rows = zip(self._times, curve["mean"], curve["error"], strict=True)
        there = [row for row in rows if row[1] is not None]
        times = [time for time, _, _ in there]
        axes.plot(times, [mean for _, mean, _ in there], style, color=colour, linewidth=1.6)
        low, high = ([mean + sign * _BAND * error for _, mean, error in there] for sign in (-1, 1))
        axes.fill_between(times, low, high, color=colour, alpha=0.16, linewidth=0)


def _steps(horizon: str) -> str:
    return "1 step" if horizon == "1" else f"{horizon} steps"


def _styles(axes: Any, words: Mapping[str, str], place: str) -> None:
    """What the lines' styles mean, in grey: colours are the models'."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=_FAINT, linestyle=style, linewidth=1.6, label=text)
        for style, text in words.items()
    ]
    if place.startswith("upper"):  # room for it above the lines
        low, high = axes.transScale.transform([(0, y) for y in axes.get_ylim()])[:, 1]
        top = axes.transScale.inverted().transform((0, low + 1.2 * (high - low)))[1]
        axes.set_ylim(top=top)
    axes.legend(handles=entries, loc=place, fontsize=8.5, frameon=False, labelcolor=_FAINT)

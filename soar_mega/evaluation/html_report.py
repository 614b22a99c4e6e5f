"""``report.html``: the table, and every prompt's pictures side by side with their scores.

One static file without scripts; pictures are linked by relative paths, so the folder can be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from soar_mega.evaluation.interface import Prompt
from soar_mega.evaluation.table import rows

# Of one picture of a model: metric (``geneval/correct``) -> value.
ScoresOf = Callable[[str, tuple[int, int]], Mapping[str, float]]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px;
  padding: 0 1rem; color: #202124; background: #fafafa; }
table { border-collapse: collapse; margin: 1rem 0; background: #fff; }
th, td { border: 1px solid #dadce0; padding: .25rem .7rem; }
td.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.category { padding-left: 2rem; color: #5f6368; }
section { border-top: 1px solid #dadce0; padding: .8rem 0; }
section h2 { font-size: 1rem; margin: 0 0 .5rem; }
section h2 span { color: #5f6368; font-weight: normal; }
.models { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: 220px; }
figure img { width: 100%; display: block; border: 1px solid #dadce0; }
figcaption { font-size: .8rem; color: #3c4043; overflow-wrap: anywhere; }
.label { font-weight: 600; font-size: .85rem; }
"""


def html_report(
    results: Mapping[str, Any],
    prompts: Sequence[Prompt],
    repeats: int,
    picture_path: Callable[[str, tuple[int, int]], str],
    scores_of: ScoresOf,
) -> str:
    """The page.

    Args:
        results: Content of ``results.json``.
        prompts: In order.
        repeats: Pictures of each prompt.
        picture_path: Of a label and a picture (prompt, repeat), from the page's folder.
        scores_of: Of a label and a picture.
    """
    labels = list(results["models"])
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>Evaluation: {escape(', '.join(labels))}</title>",
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Evaluation</h1>",
        _facts(results),
        _table(results, labels) if results["scorers"] else "<p>Nothing was scored.</p>",
    ]
    for number, prompt in enumerate(prompts):
        category = f" <span>{escape(prompt.category)}</span>" if prompt.category else ""
        parts.append(
            f'<section id="prompt-{number}">\n<h2>{number}. {escape(prompt.text)}{category}</h2>'
        )
        parts.append('<div class="models">')
        for label in labels:
            parts.append(f'<div><div class="label">{escape(label)}</div><div class="pictures">')
            for repeat in range(repeats):
                picture = number, repeat
                path = quote(picture_path(label, picture))
                shown = "<br>".join(
                    f"{escape(name)} {value:g}" for name, value in scores_of(label, picture).items()
                )
                parts.append(
                    f'<figure><img src="{path}" alt="{escape(label)}, picture {repeat}" '
                    f'loading="lazy"><figcaption>{shown}</figcaption></figure>'
                )
            parts.append("</div></div>")
        parts.append("</div>\n</section>")
    parts.append("</body>\n</html>\n")
    return "\n".join(parts)


def _facts(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    shown = ", ".join(f"{key} {value}" for key, value in settings.items())
    lines = [f"<p>{escape(str(results['prompts']['file']))}: {escape(shown)}</p>", "<ul>"]
    for label, model in results["models"].items():
        known = [f"{k} {model[k]}" for k in ("weights", "step", "size") if model.get(k) is not None]
        text = f"{model['given']} ({', '.join(known)})"
        lines.append(f"<li><b>{escape(label)}</b>: {escape(text)}</li>")
    return "\n".join([*lines, "</ul>"])


def _table(results: Mapping[str, Any], labels: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    lines = [f"<table>\n<tr><th></th>{head}</tr>"]
    for name, cells in rows(results):
        kind = ' class="category"' if name.startswith(" ") else ""
        values = "".join(f'<td class="value">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td{kind}>{escape(name.strip())}</td>{values}</tr>")
    lines.append("</table>\n<p>In brackets: 95 % intervals, bootstrap over prompts.</p><ul>")
    for name, found in results["scorers"].items():
        lines.append(f"<li>{escape(name)}: {escape(found['citation'])}</li>")
    return "\n".join([*lines, "</ul>"])

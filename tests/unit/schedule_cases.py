"""Passes for schedule tests, as the objectives declare them."""

from __future__ import annotations

from soar_mega.passes import Pass

BASE = Pass("base", "base", grad=True)


def soar_passes(
    states: int = 6, *, reuse: bool = True, guided: bool = True, group: int = 1
) -> tuple[Pass, ...]:
    """SOAR's passes with ``states`` auxiliary states over all paths; 0: flow matching's."""
    if states == 0:
        return (BASE,)
    before = [BASE]
    if not reuse:
        before.append(Pass("rollout_cond", "rollout", grad=False))
    if guided:
        before.append(Pass("rollout", "rollout", grad=False))
    after = tuple(p.name for p in before)
    return (
        *before,
        *(
            Pass(f"aux{j}", "aux", True, after, min(group, states - first), first)
            for j, first in enumerate(range(0, states, group))
        ),
    )

"""One line of a doctor's report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from soar_mega.launch.exit_codes import CONFIG_ERROR, DONE, FAILED


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``PROBLEM`` is what a person has to mend.
        text: What was found.
        fix: What to do about a problem.
        cause: ``input`` for a problem of configuration, data or model, which every start meets
            again; ``machine`` where another start may get better nodes.
    """

    level: Literal["ok", "note", "PROBLEM"]
    text: str
    fix: str | None = None
    cause: Literal["machine", "input"] = "machine"

    def __str__(self) -> str:
        lead = f"{self.level:<9}"
        text = self.text.replace("\n", "\n" + " " * len(lead))
        return lead + text + (f"\n{' ' * len(lead)}fix: {self.fix}" if self.fix else "")


def sick(findings: Iterable[Finding]) -> bool:
    """Whether a person has to do something."""
    return any(finding.level == "PROBLEM" for finding in findings)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without a problem; 78 if one is of the input, so that no start can work; else 1."""
    if any(finding.level == "PROBLEM" and finding.cause == "input" for finding in findings):
        return CONFIG_ERROR
    return FAILED if sick(findings) else DONE


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in short: ``0-7, 9``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def ranks_at(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """Ranks and where they run: ``ranks 0-7 on gpu003, 8-15 on gpu004``.

    Args:
        ranks: Some of all.
        hosts: The host of every rank.
    """
    chosen = sorted(ranks)
    by_host: dict[str, list[int]] = {}
    for rank in chosen:
        by_host.setdefault(hosts[rank], []).append(rank)
    places = [f"{spans(some)} on {host}" for host, some in by_host.items()]
    more = f" and {len(places) - 8} more hosts" if len(places) > 8 else ""
    return f"rank{'s' if len(chosen) > 1 else ''} {', '.join(places[:8])}{more}"

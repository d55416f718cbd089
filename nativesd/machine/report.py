"""How the smoke test reports: what became of every check, as text to paste into an issue and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from nativesd.machine import doctor
from nativesd.machine.cases import Size

SCHEMA = 1
"""Version of `SmokeReport.to_json`'s schema; it counts up when a name changes its meaning or goes away."""


@dataclass(frozen=True)
class Check:
    """What became of one case in one precision. `error` is None where it is no number, and `note` says why.

    seconds  of a call (on CUDA the median of three after a first one)
    peak     bytes on the card, weights included; None on the CPU
    """

    component: str
    families: tuple[str, ...]
    case: str
    precision: str
    limit: float
    status: Literal["passed", "failed", "skipped"]
    error: float | None = None
    seconds: float | None = None
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class SmokeReport:
    """What a device computes. Without a usable device nothing ran, for `reason`."""

    device: str
    size: Size
    machine: doctor.Report
    checks: tuple[Check, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    host_peak: int | None = None
    """Bytes of main memory that the process had at its peak, where that can be known."""

    @property
    def ok(self) -> bool:
        """Whether no check failed; where nothing ran, whether there is no card that should have run it."""
        found = self.machine.found
        blocked = not self.checks and bool(found.devices or found.bus)
        return not blocked and all(check.status != "failed" for check in self.checks)

    def to_json(self) -> str:
        """`schema`, `ok` and the fields of the report, named as in `SmokeReport`, `Check` and `machine.Found`."""
        fields = {name: value for name, value in asdict(self).items() if name != "machine"}
        machine = {"found": asdict(self.machine.found), "findings": [asdict(f) for f in self.machine.findings]}
        return json.dumps({"schema": SCHEMA, "ok": self.ok, **fields, "machine": machine}, indent=2)

    def to_text(self) -> str:
        """The machine, then a Markdown table of the checks."""
        lines = [*self.machine.to_text().splitlines(), ""]
        if not self.checks:
            return "\n".join([*lines, f"not run: {self.reason}"])
        lines += [
            f"Smoke test on {self.device}, {self.size} sizes: difference from float32 on the CPU",
            "",
            "| component | of | case | precision | difference | limit | ms | peak GB | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for check in self.checks:
            cells = [
                check.component, ", ".join(check.families), check.case, check.precision,
                "" if check.error is None else f"{check.error:.1e}",
                f"{check.limit:g}",
                "" if check.seconds is None else f"{check.seconds * 1e3:.1f}",
                "" if check.peak is None else f"{check.peak / 1e9:.2f}",
                ": ".join(filter(None, (check.status, check.note))),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        counts = {status: sum(c.status == status for c in self.checks) for status in ("passed", "failed", "skipped")}
        memory = "" if self.host_peak is None else f", main memory at its peak {self.host_peak / 1e9:.1f} GB"
        total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([*lines, "", f"{total}; {self.seconds:.0f} s{memory}"])

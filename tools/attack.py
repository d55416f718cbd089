"""Hostile inputs from a seed: what was tried, refused, read, and what broke a promise of docs/security.md.

python tools/attack.py [--minutes M | --count N] [--seed S] [--only KIND] [--workers W]

Every input must be read, or refused by a NativesdError, within 5 s of the processor (of the hub 10 s; by the clock
three times that, as the machine may be busy) and 1 GB, and leave the files of others as they are. The table says so of
each kind; what failed is printed with its seed, and
`--only KIND --seed SEED --count 1` repeats it. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping

from attacks.kinds import EVERY, KINDS
from attacks.pool import Row, attack


def main() -> int:
    """Run, print the table, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--count", type=int, help="inputs over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=EVERY, action="append", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    minutes = 1.0 if given.minutes is None and given.count is None else given.minutes
    rows = {kind: Row() for kind in given.only or KINDS}
    start = time.monotonic()
    for kind, seed, outcome in attack(
        list(rows), seed=given.seed, count=given.count, seconds=None if minutes is None else 60 * minutes,
        workers=given.workers,
    ):  # fmt: skip
        rows[kind].add(seed, outcome)
        if rows[kind].failures and rows[kind].failures[-1][0] == seed:
            print(f"{kind}, seed {seed}: {outcome.what}", file=sys.stderr, flush=True)
    print_table(rows, time.monotonic() - start)
    return 1 if any(row.failures for row in rows.values()) else 0


def print_table(rows: Mapping[str, Row], seconds: float) -> None:
    """What was tried of each kind, and what became of it."""
    print(f"{'kind':<11}{'tried':>8}{'refused':>9}{'ok':>8}{'failed':>8}{'slowest':>10}{'memory':>10}  threat")
    for kind, row in rows.items():
        numbers = [row.counts.total(), row.counts["refused"], row.counts["ok"], row.counts["failed"]]
        print(
            f"{kind:<11}{numbers[0]:>8}{numbers[1]:>9}{numbers[2]:>8}{numbers[3]:>8}"
            f"{row.slowest:>8.2f} s{row.memory:>7.2f} GB  {EVERY[kind].threat}"
        )
    total = sum(row.counts.total() for row in rows.values())
    failed = sum(row.counts["failed"] for row in rows.values())
    print(f"{total} inputs in {seconds / 60:.1f} minutes, {failed} failed")


if __name__ == "__main__":
    sys.exit(main())

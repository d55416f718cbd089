"""How many machines, how many hours and what costs: a formula for `nativesd batch`, and a simulation that checks it.

    python tools/simulate_batch.py                  # a year of 10^9 pictures of the embedded model, measured here
    python tools/simulate_batch.py --load 30 --call 0.4 --row 2.1 --batch 8 --pictures 1e6 --machines 16 --price 2.5

A machine loads its model (`load` seconds), and then paints batch after batch; a batch of b rows takes `call` + b `row`
seconds, which two measurements of a model give. After a time that is exponential with the mean `mtbf` (hours) it fails,
its batch in flight is lost, and `restart` seconds later another one begins its shard again. Rows fall to shards by a
hash, so shards differ by chance. The formula has the means of all that, and what the unluckiest shard has beyond
them; the simulation draws it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

YEAR = 365 * 24.0
"""Hours."""


@dataclass(frozen=True)
class Fleet:
    """Machines that paint the shards of one file; times in seconds but for `mtbf`, in hours; `price` of an hour."""

    pictures: float
    machines: int
    batch: int
    load: float
    call: float
    row: float
    mtbf: float
    restart: float
    price: float

    @property
    def seconds(self) -> float:
        """Of a batch."""
        return self.call + self.batch * self.row

    @property
    def availability(self) -> float:
        """The share of a machine's time in which it paints what is kept.

        Of every `mtbf` of running the load and, in the mean, half a batch are lost, and the restart comes on top.
        """
        running = self.mtbf * 3600
        return max(running - self.load - self.seconds / 2, 0) / (running + self.restart)

    @property
    def rate(self) -> float:
        """Pictures of a machine in an hour."""
        return 3600 * self.batch / self.seconds * self.availability

    @property
    def largest(self) -> float:
        """Rows of the largest shard, about: the mean and sqrt(2 ln N) standard deviations of a binomial."""
        mean = self.pictures / self.machines
        spread = math.sqrt(mean * (1 - 1 / self.machines) * 2 * math.log(self.machines)) if self.machines > 1 else 0
        return mean + spread

    @property
    def lost(self) -> float:
        """Seconds that a failure costs: the load, in the mean half a batch, and the restart."""
        return self.load + self.seconds / 2 + self.restart

    @property
    def unlucky(self) -> float:
        """Failures of the machine that has the most, beyond the mean m of all.

        With many, sqrt(2 ln N) standard deviations of a Poisson distribution; with few, whether any machine has one.
        """
        mean = self.pictures / self.machines / self.rate / self.mtbf
        return max(math.sqrt(2 * mean * math.log(self.machines)), 1 - math.exp(-self.machines * mean))

    @property
    def hours(self) -> float:
        """Until the last shard is done."""
        return self.load / 3600 + self.largest / self.rate + self.unlucky * self.lost / 3600

    @property
    def dollars(self) -> float:
        """What the machines cost while they run; one whose shard is done is given back."""
        return self.machines * self.price * (self.load / 3600 + self.pictures / self.machines / self.rate)


def simulate(fleet: Fleet, rng: np.random.Generator) -> tuple[float, float]:
    """The hours until the last shard is done, and the dollars, of one draw."""
    chances = np.full(fleet.machines, 1 / fleet.machines)
    rows = rng.multinomial(round(fleet.pictures), chances)
    hours = [_shard(fleet, int(each), rng) / 3600 for each in rows]
    return max(hours), sum(hours) * fleet.price


def _shard(fleet: Fleet, rows: int, rng: np.random.Generator) -> float:
    """Seconds until a shard is done, from one failure to the next."""
    batches, taken = math.ceil(rows / fleet.batch), 0.0
    while True:
        runs = rng.exponential(fleet.mtbf * 3600)
        needs = fleet.load + batches * fleet.seconds
        if runs >= needs:
            return taken + needs
        batches -= max(math.floor((runs - fleet.load) / fleet.seconds), 0)
        taken += runs + fleet.restart


def machines_for(fleet: Fleet, hours: float) -> int:
    """How many machines have all pictures done in so many hours."""
    count = max(math.ceil(fleet.pictures / fleet.rate / hours), 1)
    while replace(fleet, machines=count).hours > hours:
        count += 1
    return count


def measure(steps: int) -> tuple[float, float, float]:
    """Seconds to load the embedded model, of a call, and of a row in it, on one core of this machine."""
    import nativesd

    begun = time.thread_time()  # which other programs do not change
    pipe = nativesd.load()
    load = time.thread_time() - begun
    times = {}
    for batch in (1, 2, 4, 8):
        tries = []
        for _ in range(4):
            begun = time.thread_time()
            pipe(["a strawberry on a yellow background"] * batch, seed=list(range(batch)), steps=steps)
            tries.append(time.thread_time() - begun)
        times[batch] = min(tries)
    row, call = np.polyfit(list(times), list(times.values()), 1)
    print("measured: " + ", ".join(f"batch of {batch} {seconds:.3f} s" for batch, seconds in times.items()))
    return load, max(float(call), 0.0), float(row)


def main() -> None:
    """Measure or be told, and print formula and simulation side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=float, default=1e9)
    parser.add_argument("--hours", type=float, default=YEAR, help="in which all are to be done, where no --machines")
    parser.add_argument("--machines", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of the embedded model, where it is measured")
    parser.add_argument("--load", type=float, help="seconds; with --call and --row nothing is measured")
    parser.add_argument("--call", type=float)
    parser.add_argument("--row", type=float)
    parser.add_argument("--mtbf", type=float, default=720, help="hours between a machine's failures")
    parser.add_argument("--restart", type=float, default=300, help="seconds until another one is there")
    parser.add_argument("--price", type=float, default=1.0, help="dollars of a machine's hour")
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    told = (given.load, given.call, given.row)
    load, call, row = measure(given.steps) if None in told else told
    fleet = Fleet(
        given.pictures, given.machines or 1, given.batch, load, call, row, given.mtbf, given.restart, given.price
    )
    if given.machines is None:
        fleet = replace(fleet, machines=machines_for(fleet, given.hours))
    rng = np.random.default_rng(0)
    draws = [simulate(fleet, rng) for _ in range(given.draws)]
    hours, dollars = (float(np.mean(column)) for column in zip(*draws, strict=True))
    print(f"load {load:.2f} s, a call {call:.3f} s, a row {row:.3f} s, batches of {fleet.batch}")
    print(f"a machine: {fleet.rate:,.0f} pictures an hour, {fleet.rate / fleet.price:,.0f} a dollar", end="")
    print(f", {1 - fleet.availability:.3%} of its time lost")
    print(f"a lost machine: {fleet.batch} pictures at most, and {fleet.lost:,.0f} s")
    print(f"{fleet.pictures:,.0f} pictures, {fleet.machines} machines")
    print(f"{'':<10}{'hours':>14}{'dollars':>16}")
    print(f"{'formula':<10}{fleet.hours:>14,.2f}{fleet.dollars:>16,.2f}")
    print(f"{'simulated':<10}{hours:>14,.2f}{dollars:>16,.2f}")


if __name__ == "__main__":
    main()

"""A server under load: many clients at once, some that read slowly, some that go away; and what a request costs.

    python tools/load_server.py                      # 1,000 requests of 50 clients
    python tools/load_server.py --requests 100 --clients 10

It starts `nativesd serve` with the embedded model and compares every picture with the library's. 10 of the clients
read their answers slowly, and a tenth of the requests is given up: in the middle of the body, while the job waits or
runs, or in the middle of the answer. A client that is told that the queue is full comes back. Every wait has a limit.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import nativesd

PROMPT = "a strawberry on a yellow background"
PATH = "/sdapi/v1/txt2img"
SEEDS = 8
SLOW_READERS = 10
GIVEN_UP = 0.1
LONGEST = 60.0
"""Seconds without a byte after which an answer is counted as lost."""
REPORT = 5.0
"""Seconds between lines of progress."""


@dataclass
class Load:
    """One run: the address, how many steps a picture has, the right picture of every seed, what became of requests."""

    port: int
    steps: int
    wanted: list[NDArray[np.uint8]]
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def body(self, seed: int) -> bytes:
        """A request of A1111's API."""
        return json.dumps({"prompt": PROMPT, "seed": seed, "steps": self.steps}).encode()

    def count(self, what: str) -> None:
        """Note what became of a request."""
        with self.lock:
            self.counts[what] += 1

    def client(self, number: int, requests: int) -> None:
        """The requests of a client, one after the other."""
        chance = random.Random(number)
        for _ in range(requests):
            seed = chance.randrange(SEEDS)
            try:
                if chance.random() < GIVEN_UP:
                    self.give_up(seed, chance)
                    continue
                while (said := self.ask(seed, slow=number < SLOW_READERS)) == "503":
                    self.count("told to come back")
                    time.sleep(0.5 + chance.random())
            except (OSError, http.client.HTTPException) as error:
                said = type(error).__name__
            self.count("right" if said == "right" else f"wrong: {said}")

    def ask(self, seed: int, *, slow: bool = False) -> str:
        """ "right", the status where it is not 200, or what is wrong with the picture."""
        return self.judge(seed, *self.answer(seed, slow=slow))

    def answer(self, seed: int, *, slow: bool = False) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST)) as connection:
            connection.request("POST", PATH, self.body(seed))
            answer = connection.getresponse()
            return answer.status, slowly(answer) if slow else answer.read()

    def judge(self, seed: int, status: int, data: bytes) -> str:
        """What `ask` says of an answer."""
        if status != 200:
            return str(status)
        found = np.asarray(Image.open(BytesIO(base64.b64decode(json.loads(data)["images"][0]))))
        return "right" if np.array_equal(found, self.wanted[seed]) else "another picture"

    def give_up(self, seed: int, chance: random.Random) -> None:
        """Close the connection at one of three moments."""
        moment = chance.choice(("in the body", "before the answer", "in the answer"))
        body = self.body(seed)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=LONGEST) as connection:
            connection.sendall(head + (body[:10] if moment == "in the body" else body))
            if moment == "in the answer":
                connection.recv(100)
            else:
                time.sleep(chance.random() / 2)
        self.count(f"given up {moment}")


def slowly(answer: http.client.HTTPResponse) -> bytes:
    """An answer in small pieces with pauses."""
    data = b""
    while piece := answer.read(512):
        data += piece
        time.sleep(0.02)
    return data


def get(port: int, path: str) -> str:
    """The text of an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def left(port: int) -> int:
    """Jobs that wait or run."""
    health = json.loads(get(port, "/health"))
    return int(health["waiting"]) + int(health["running"])


def megabytes(port: int) -> float:
    """Main memory of the server."""
    line = next(line for line in get(port, "/metrics").splitlines() if line.startswith("process_resident"))
    return float(line.split()[1]) / 1e6


@contextmanager
def started() -> Iterator[int]:
    """The port of a `nativesd serve` with the embedded model."""
    command = [sys.executable, "-m", "nativesd", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = int(next(line for line in process.stderr if "listening" in line).strip().rpartition(":")[2])
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log never fills the pipe
            yield port
        finally:
            process.terminate()
            process.wait(LONGEST)


def under_load(load: Load, requests: int, clients: int) -> bool:
    """All clients at once; whether none was answered wrong, and nothing was left."""
    begun = time.perf_counter()
    memory = [megabytes(load.port)]
    share = [requests // clients + (number < requests % clients) for number in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load.client, number, share[number]) for number in range(clients)]
        while wait(running, REPORT).not_done:
            memory.append(megabytes(load.port))
            print(f"{time.perf_counter() - begun:5.0f} s  {memory[-1]:.0f} MB  {dict(load.counts)}", flush=True)
        for each in running:
            each.result()
    took = time.perf_counter() - begun
    until = time.monotonic() + LONGEST
    while (jobs := left(load.port)) and time.monotonic() < until:
        time.sleep(0.1)
    memory.append(megabytes(load.port))
    answered = sum(number for what, number in load.counts.items() if what != "told to come back")
    wrong = sum(number for what, number in load.counts.items() if what.startswith("wrong"))
    print(f"{answered} requests of {clients} clients in {took:.0f} s: {dict(sorted(load.counts.items()))}")
    print(f"answered wrong    {wrong}")
    print(f"jobs left         {jobs}")
    print(f"memory            {', '.join(f'{each:.0f}' for each in memory)} MB")
    return answered == requests and wrong == jobs == 0


def cost(load: Load, pipe: nativesd.Pipeline, rounds: int) -> bool:
    """What a request takes more than the library, in turns, from its first byte to the last one of the answer.

    The spread of the library's own time, before each request and after it, tells what the difference is worth.
    """
    library, again, served = (np.empty(rounds) for _ in range(3))
    right = True
    for i in range(rounds):
        seed = i % SEEDS
        library[i] = seconds_of(pipe, seed, load.steps)
        begun = time.perf_counter()
        answer = load.answer(seed)
        served[i] = time.perf_counter() - begun
        right &= load.judge(seed, *answer) == "right"
        again[i] = seconds_of(pipe, seed, load.steps)
    quantiles = [1000 * np.quantile(seconds, (0.5, 0.95)) for seconds in (library, served, again)]
    for name, (median, high) in (
        ("library", quantiles[0]),
        ("request", quantiles[1]),
        ("library again", quantiles[2]),
        ("overhead of a request", quantiles[1] - quantiles[0]),
        ("overhead of the library again", quantiles[2] - quantiles[0]),
    ):
        print(f"{load.steps} steps, {name:<29} p50 {median:6.1f} ms, p95 {high:6.1f} ms", flush=True)
    return right


def seconds_of(pipe: nativesd.Pipeline, seed: int, steps: int) -> float:
    """What the library takes for a picture."""
    begun = time.perf_counter()
    pipe(PROMPT, seed=seed, steps=steps)
    return time.perf_counter() - begun


def main() -> int:
    """Run, print, and say by the exit code whether all was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2, help="of a picture")
    parser.add_argument("--rounds", type=int, default=100, help="requests one at a time, to see what they cost")
    options = parser.parse_args()
    pipe = nativesd.load()
    wanted = [np.asarray(pipe(PROMPT, seed=seed, steps=options.steps).images[0]) for seed in range(SEEDS)]
    print(f"nativesd {nativesd.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with started() as port:
        load = Load(port, options.steps, wanted)
        right = cost(load, pipe, options.rounds)
        right &= under_load(load, options.requests, options.clients)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

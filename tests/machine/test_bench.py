"""The benchmark: every way computes the same on the same tensors, and its figures are what they are said to be."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from conftest import Run
from models.test_models import UNETS
from nativesd.machine import bench
from nativesd.machine.timing import Report
from nativesd.tuning.tune import products_of_8_bits
from oracles import TOLERANCE, difference

CPU = torch.device("cpu")
WAYS = ["nativesd plain", "nativesd", *(["nativesd int8"] if products_of_8_bits(torch.float32) else [])]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[bench.Case]:
    """A case of small widths."""
    case = bench.Case("unet", "small", 8, "fp32", 2)
    monkeypatch.setitem(bench.UNETS, "small", UNETS["sd21"])
    monkeypatch.setitem(bench.CASES, case.name, case)
    threads = torch.get_num_threads()
    yield case
    torch.set_num_threads(threads)


@torch.inference_mode()
def test_every_way_runs_on_the_same_tensors(small: bench.Case) -> None:
    plain = bench.empty_module(small)
    bench.draw(plain, CPU)
    inputs = bench.make_inputs(small, CPU)
    ways = bench.native_ways(plain, small, inputs)
    results = [way() for way in ways.values()]
    assert difference(*results[:2]) <= TOLERANCE  # type: ignore[arg-type]
    assert all(difference(found, results[0]) <= 0.1 for found in results[2:])  # type: ignore[arg-type]
    assert bench.twin(plain, small).get_parameter("conv_in.weight").data_ptr() == plain.conv_in.weight.data_ptr()  # type: ignore[union-attr]
    timings = list(bench.measure(small, ways, CPU, rounds=2, repeat=3, clock="cpu"))
    assert [timing.way for timing in timings] == WAYS
    report = Report(bench.machine(CPU, "cpu"), timings)
    for timing in timings:
        assert timing.first > 0
        assert len(timing.seconds) == 6
        assert min(timing.seconds) <= timing.median <= max(timing.seconds)
        assert timing.flops > 1e6
        assert 0 < timing.share < 1
        assert report.ratio(timing, timing.way) == 1
    assert json.loads(json.dumps(report.fields()))["timings"][0]["case"] == small.name


def test_flops_are_those_of_the_products() -> None:
    # a step of SD2.1 at 64x64: 1,608 GFLOP, attention included
    assert bench.count_flops(bench.CASES["unet sd21 64x64 bf16"]) == pytest.approx(1608.5e9, rel=1e-3)


def test_command(small: bench.Case, run: Run) -> None:
    done = run("bench", "--case", small.name, "--device", "cpu", "--threads", "1", "--rounds", "1", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["machine"]["threads"] == 1
    assert [timing["way"] for timing in report["timings"]] == WAYS
    table = run("bench", "--case", small.name, "--device", "cpu", "--rounds", "1").stdout
    assert all(word in table for word in (small.name, "nativesd plain", "it/s", "% of peak"))


def test_a_case_that_is_not_there(run: Run) -> None:
    done = run("bench", "--case", "unet sd9")
    assert done.returncode == 2
    assert done.stderr.startswith("nativesd: 'unet sd9' is not a case: they are unet sd21 64x64 bf16, unet sd21")

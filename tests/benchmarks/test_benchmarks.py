"""The benchmarks run, and what they compute from times is right."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks import (
    allocator,
    bench_cpu,
    contestants,
    fit_auto,
    goals,
    memory,
    soak,
    steps,
    tables,
    timing,
)
from benchmarks.cases import LONG, SHORT, Case, Grid, Shape, episode_lengths, make_batch, starts
from benchmarks.contestants import (
    AUTO,
    CUT,
    GEMM,
    LOOP,
    NATIVE,
    NO_RESETS,
    PAD,
    PAD_OWN,
    SCAN,
    TORCHRL_PAD,
    TORCHRL_SCAN,
)
from benchmarks.memory import MemoryRecord
from benchmarks.records import Results
from benchmarks.report_cpu import write_report
from benchmarks.sequences import BOTH, FORWARD, Record, time_together
from benchmarks.steps import FLOOR, MODULE, OURS, TORCHRL, StepRecord
from benchmarks.timing import Budget, Timing, geomean, interleave


class FakeTime:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.worked: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a call that takes these times in turns."""
        calls = iter(range(10**6))

        def work() -> None:
            self.worked.append(name)
            self.now += seconds[next(calls) % len(seconds)]

        return work


def test_timings_are_quartiles_of_samples_after_two_calls_to_warm_up() -> None:
    clock = FakeTime()
    call = clock.worker("a", 9.0, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5)
    timings = interleave({"a": call}, Budget(seconds=0.5, fewest=5, most=5), clock)
    assert timings["a"] == pytest.approx((0.3, 0.2, 0.4, 5))
    assert timings["a"].spread == pytest.approx(0.2 / 0.3)


def test_rounds_have_an_order_of_their_own() -> None:
    clock = FakeTime()
    calls = {name: clock.worker(name, 0.1) for name in "abc"}
    interleave(calls, Budget(seconds=3.0, fewest=3, most=30), clock)
    worked = "".join(clock.worked)
    assert worked[:6] == "aabbcc"  # to warm up and to estimate
    rounds = [worked[k : k + 3] for k in range(6, len(worked), 3)]
    assert len(rounds) == 30 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    # Each comes after any other.
    follows = {x + y for x, y in pairwise(worked[6:]) if x != y}
    assert follows == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_slow_contestants_get_fewer_samples_over_the_same_stretch() -> None:
    clock = FakeTime()
    calls = {"slow": clock.worker("S", 0.5), "fast": clock.worker("f", 0.125)}
    timings = interleave(calls, Budget(seconds=1.125, fewest=3, most=9), clock)
    assert (timings["slow"].rounds, timings["fast"].rounds) == (3, 9)
    worked = "".join(clock.worked)
    assert worked[:4] == "SSff"  # to warm up and to estimate
    assert [worked[k : k + 4].count("S") for k in (4, 8, 12)] == [1, 1, 1]


def test_calls_of_seconds_are_run_no_more_often_than_needed() -> None:
    clock = FakeTime()
    timings = interleave({"a": clock.worker("a", 5.0)}, Budget(fewest=3), clock)
    assert timings["a"].rounds == 3
    assert len(clock.worked) == 4


def test_fast_calls_are_repeated_within_a_sample() -> None:
    clock = FakeTime()
    budget = Budget(seconds=1.0, fewest=3, most=3, sample=0.01)
    timings = interleave({"a": clock.worker("a", 0.002)}, budget, clock)
    assert timings["a"].median == pytest.approx(0.002)
    assert len(clock.worked) == 2 + 3 * 5


def test_geomean_does_not_care_which_side_is_the_denominator() -> None:
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert geomean([1 / 2, 1 / 8]) == pytest.approx(1 / 4)


def test_flops_count_every_matmul_of_every_layer() -> None:
    B, T, I, H = 2, 3, 5, 7
    # Per layer: inputs and states times weights; each forward once and backward twice.
    first, second = (2 * B * T * (size + H) * 3 * H for size in (I, H))
    assert Case("GRU", Shape(B, T, I, H, 2), 0.0).matmul_flops == 3 * (first + second)
    assert Case("LSTM", Shape(B, T, I, H, 2), 0.0).matmul_flops == 4 * (first + second)


def test_state_entries_are_the_primer_s() -> None:
    case = Case("LSTM", Shape(2, 3, 5, 7, 2), 0.0)
    states = make_batch(case).states.values()
    assert case.state_bytes == sum(s.numel() * s.element_size() for s in states)


@pytest.mark.parametrize("resets", [0.0, 0.1, SHORT, LONG])
def test_flags_of_every_row_start_and_draws_repeat(resets: float | str) -> None:
    flags = starts(resets, 50, 1000)
    assert flags.shape == (50, 1000)
    assert flags[:, 0].all()
    assert torch.equal(flags, starts(resets, 50, 1000))


def test_starts_are_as_frequent_as_asked() -> None:
    assert starts(0.0, 50, 1000)[:, 1:].sum() == 0
    assert starts(0.1, 50, 1000).float().mean() == pytest.approx(0.1, rel=0.05)
    for name in (SHORT, LONG):
        mean = episode_lengths(name).mean()
        assert starts(name, 50, 5000)[:, 1:].float().mean() == pytest.approx(1 / mean, rel=0.05)
    assert episode_lengths(SHORT).mean() < 30 < 300 < episode_lengths(LONG).mean()


def test_contestants_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_resets(layers: torch.nn.RNNBase, batch: contestants.Batch) -> torch.Tensor:
        return layers(batch.x)[0]

    contestants.check_agreement((AUTO, PAD, SCAN, LOOP, PAD_OWN, TORCHRL_PAD, NATIVE, CUT))
    monkeypatch.setattr(contestants, "_run_in_loop", forgets_resets)
    with pytest.raises(AssertionError, match="'nn in a loop' differs from 'auto'"):
        contestants.check_agreement((AUTO, CUT))


def test_peak_counts_what_is_held_at_once() -> None:
    case = Case("LSTM", Shape(8, 16, 32, 64), 0.1)
    B, T, I, H, _ = case.shape
    gradients = 4 * (B * T * I + 4 * H * (I + H + 2))
    peak = memory.peak_of(NATIVE, case)
    # Besides the gradients at least outputs, cell states and activated gates are kept.
    assert peak > gradients + 4 * B * T * 6 * H
    assert peak < 10 * gradients
    assert memory.peak_of(AUTO, case) > peak


TINY = Shape(2, 8, 4, 8)


def _grid(*cases: Case) -> Grid:
    return Grid(
        cases=cases,
        forward=cases,
        growth=tuple(Case("GRU", Shape(8 // T, T, 4, 8), 0.05) for T in (2, 8))
        + (Case("LSTM", TINY, 0.05),),
        growth_torchrl=0,
        memory=cases[:1],
        memory_growth=(),
        batches=(2,),
        environments=(1, 2),
    )


def test_bench_runs_and_keeps_all_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What takes seconds is made small, or left out: TorchRL's scan traces before it runs.
    fast = (AUTO, PAD, SCAN, TORCHRL_PAD, NATIVE, CUT)
    monkeypatch.setattr(contestants, "ALL", fast)
    monkeypatch.setattr(bench_cpu, "quick_grid", lambda: _grid(Case("GRU", TINY, 0.1)))
    monkeypatch.setattr(contestants, "check_agreement", lambda: None)
    monkeypatch.setattr(contestants, "make_gemm", partial(contestants.make_gemm, 64))
    monkeypatch.setattr(steps, "STEPS_PER_BATCH", 4)
    threads = torch.get_num_threads()
    bench_cpu.main(["--quick", "--threads", str(threads), "--output", str(tmp_path)])
    page = (tmp_path / "cpu.md").read_text()
    assert {p.name for p in tmp_path.iterdir()} >= {"cpu.json", "cpu_growth.png", "cpu_bound.png"}
    for title in ("GRU, forward + backward", "GRU, forward\n", "Collection", "Peak memory"):
        assert title in page
    bench_cpu.main(["--render", "--output", str(tmp_path)])
    assert (tmp_path / "cpu.md").read_text() == page
    assert "## Goals" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def _fake_run(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Make the run of a grid of three cases quick, and interrupt it at one of them."""
    begun: list[Case] = []

    def time_once(phase: str, wanted: Sequence[tuple[Case, Any]], budget: Budget) -> list[Record]:
        begun.append(wanted[0][0])
        if len(begun) == stop_at:
            raise KeyboardInterrupt
        return [_record(0.1)]

    monkeypatch.setattr(contestants, "check_agreement", lambda: None)
    monkeypatch.setattr(bench_cpu, "time_together", time_once)
    cases = [Case("GRU", TINY, p) for p in (0.0, 0.1, 0.5)]
    monkeypatch.setattr(bench_cpu, "quick_grid", lambda: _grid(*cases))


def test_bench_after_an_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    threads = str(torch.get_num_threads())
    _fake_run(monkeypatch, stop_at=3)
    arguments = ["--quick", "--only", "sequences", "--threads", threads, "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="cpu_unfinished.json"):
        bench_cpu.main(arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["cpu_unfinished.json"]
    kept = Results.load(tmp_path / "cpu_unfinished.json")
    assert len(kept.sequences) == 2
    bench_cpu.main(["--render", "cpu_unfinished.json", "--output", str(tmp_path)])
    assert "| cut off | yes |" in (tmp_path / "cpu.md").read_text()


def test_bench_out_of_time_counts_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    threads = str(torch.get_num_threads())
    _fake_run(monkeypatch, stop_at=99)
    arguments = ["--quick", "--only", "sequences", "--threads", threads, "--output", str(tmp_path)]
    bench_cpu.main([*arguments, "--minutes", "0"])
    page = (tmp_path / "cpu.md").read_text()
    assert "| left out for lack of time | 6 of 6 cases |" in page
    assert not (tmp_path / "cpu_unfinished.json").exists()


def test_record_holds_the_seconds_of_one_operation_of_a_matmul() -> None:
    case = Case("GRU", TINY, 0.1)
    (record,) = time_together(FORWARD, [(case, (AUTO, NO_RESETS))], Budget(0.01, 1, 1))
    assert set(record.timings) == {AUTO, NO_RESETS, GEMM}
    assert record.bound() == pytest.approx(case.matmul_flops * record.seconds(GEMM))
    # Between a gigaflop and a hundred teraflops per second.
    assert 1e-14 < record.seconds(GEMM) < 1e-9


def _timings(seconds: dict[str, float]) -> dict[str, Timing]:
    return {name: Timing(s, 0.9 * s, 1.1 * s, 5) for name, s in seconds.items()}


def _record(resets: float, T: int = 64, cell: str = "LSTM", **changes: float) -> Record:
    """A case in which ``auto`` takes a second, and others as long as the test says."""
    seconds = {
        AUTO: 1.0,
        PAD: 1.0,
        SCAN: 1.0,
        LOOP: 1.0,
        PAD_OWN: 1.0,
        TORCHRL_PAD: 1.0,
        TORCHRL_SCAN: 1.0,
        NATIVE: 1.0,
        CUT: 1.0,
        GEMM: 1e-9,
    }
    names = {"torchrl_pad": TORCHRL_PAD, "torchrl_scan": TORCHRL_SCAN, "no_resets": NO_RESETS}
    seconds |= {names.get(name, name): value for name, value in changes.items()}
    return Record(Case(cell, Shape(4, T, 16, 32), resets), BOTH, _timings(seconds))


def _goal(results: Results, against: str, cell: str = "LSTM") -> goals.Goal:
    (goal,) = (g for g in goals.all_goals(results) if against in g.against and g.cell == cell)
    return goal


def _sequences(*records: Record) -> Results:
    return Results({}, sequences=list(records))


def test_goals_without_figures_are_left_open() -> None:
    judged = goals.all_goals(Results({}))
    assert {(goal.reached, goal.met) for goal in judged} == {(None, None)}
    assert "not measured" in write_report(Results({}))


def test_speedup_is_over_the_better_of_torchrl_s_backends() -> None:
    fast = _record(0.1, torchrl_pad=2.0, torchrl_scan=30.0)
    faster = _record(0.02, torchrl_pad=90.0, torchrl_scan=8.0)
    without_resets = _record(0.0, torchrl_pad=0.1)
    long_rows = _record(0.1, T=512, torchrl_pad=10.0, torchrl_scan=9.0)
    results = _sequences(fast, faster, without_resets, long_rows)
    short = _goal(results, "T up to 256")
    assert short.reached == "4.00 times faster; least 2.00, 2 cases"
    assert short.met
    assert _goal(results, "T of 512").reached == "9.00 times faster; least 9.00, 1 cases"


def test_goal_is_missed_by_its_mean_or_by_one_case() -> None:
    def met(*speedups: float) -> bool | None:
        records = [_record(0.1, torchrl_pad=s, torchrl_scan=99.0) for s in speedups]
        return _goal(_sequences(*records), "T up to 256").met

    assert met(2.0, 5.0)
    assert not met(2.0, 4.0)
    assert not met(0.9, 50.0)


def test_native_layers_are_compared_with_and_without_resets() -> None:
    results = _sequences(_record(0.0, nn=0.8), _record(0.1, nn=0.5))
    without = _goal(results, "resets; batches without resets")
    assert without.reached == "1.25 times; most 1.25, 1 cases"
    assert without.met
    with_resets = _goal(results, "resets; batches with resets")
    assert with_resets.reached == "2.00 times; most 2.00, 1 cases"
    assert not with_resets.met


def test_price_of_resets_is_read_where_both_took_turns() -> None:
    results = _sequences(_record(0.1, no_resets=0.8), _record(0.5))
    assert _goal(results, "probability .1").reached == "1.25 times; most 1.25, 1 cases"


def test_growth_is_over_the_shortest_rows() -> None:
    rows: list[tuple[int, float]] = [(64, 1.0), (512, 1.6), (256, 1.2)]
    grown = [_record(0.05, T, auto=s) for T, s in rows]
    goal = _goal(Results({}, growth=grown), "rows of growing length, constant")
    assert goal.reached == "1.60 times from T=64 to 512; most 1.60 at 512"
    assert not goal.met


def test_share_of_bound_is_flops_over_time() -> None:
    record = _record(0.1, cell="GRU", auto=1e-3, nn=2e-3)
    share = record.case.matmul_flops * 1e-9 / 1e-3
    goal = _goal(_sequences(record), "matmul bound", "GRU")
    assert goal.reached == f"{share:.0%} (`nn.GRU` without resets {share / 2:.0%}), 1 cases"


def test_single_steps_are_judged_at_one_environment() -> None:
    def record(batch: int, ours: float) -> StepRecord:
        seconds = {OURS: ours, TORCHRL: 400e-6, FLOOR: 30e-6}
        return StepRecord(MODULE, "LSTM", batch, _timings(seconds))

    results = Results({}, steps=[record(8, 1.0), record(1, 100e-6)])
    assert _goal(results, "TorchRL's module").reached == "4.00 times faster"
    goal = _goal(results, "time of one step")
    expected = "100 us where TorchRL takes 400 and `nn.LSTMCell` 30: 102 on such a core"
    assert goal.reached == expected and goal.met
    slow = Results({}, steps=[record(1, 139e-6)])
    assert not _goal(slow, "time of one step").met


def test_memory_may_add_the_state_entries() -> None:
    case = Case("GRU", Shape(2, 8, 4, 8), 0.1)

    def met(peak: int) -> bool | None:
        record = MemoryRecord(case, {AUTO: peak, NATIVE: 1000})
        return _goal(Results({}, memory=[record]), "peak memory: that", "GRU").met

    assert met(1000 + case.state_bytes)
    assert not met(1001 + case.state_bytes)


def test_memory_grows_as_rows_do() -> None:
    records = [
        MemoryRecord(Case("GRU", Shape(2, T, 4, 8), 0.1), {AUTO: peak})
        for T, peak in ((64, 6000), (8, 1000))
    ]
    goal = _goal(Results({}, memory_growth=records), "peak memory of rows", "GRU")
    assert goal.reached == "6.0 times for rows 8 times longer"
    assert goal.met


def test_regret_is_over_the_best_single_backend() -> None:
    """What ``auto`` runs, "pad", was timed twice; the lower time counts."""
    same, worse = (
        _record(0.1, auto=1.3, pad=1.0, scan=2.0),
        _record(0.1, auto=1.2, pad=1.5, scan=1.0),
    )
    assert [goals.regret(record) for record in (same, worse)] == pytest.approx([1.0, 1.2])
    goal = _goal(_sequences(same, worse), "`auto` against")
    assert goal.reached == "1.10 times; most 1.20, 2 cases" and not goal.met


def test_fit_ranks_cases_by_regret_and_counts_those_beyond_the_limit() -> None:
    changes: Sequence[dict[str, Any]] = ({}, {"scan": 0.5}, {PAD_OWN: 0.25})
    records = [_record(0.1, cell=cell, **c) for cell in ("LSTM", "GRU") for c in changes]
    records += [Record(record.case, FORWARD, record.timings) for record in records]  # pyright: ignore[reportArgumentType]
    lines = fit_auto.summarize(records, limit=1.15).splitlines()
    assert lines[2].endswith("| scan | 2.00 |")
    totals = lines[-4:]
    # The mean of 2, 1 and 1; the variant would have been four times as fast as auto.
    assert totals[0] == "| LSTM | forward + backward | 1.26 | 2.00 | 1 of 3 | 4.00 |"
    assert totals[3].startswith("| GRU | forward |")


def test_fit_times_cases_beyond_the_limit_again(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[Budget] = []

    def time_once(phase: str, wanted, budget: Budget, clock: Callable) -> list[Record]:
        budgets.append(budget)
        return [_record(0.1, scan=0.5 if len(budgets) == 1 else 1.0)]

    monkeypatch.setattr(fit_auto, "time_together", time_once)
    cases = fit_auto.fit_cases(quick=True)[:1]
    records = fit_auto.measure(cases, Budget(1.0, 3, 5), limit=1.15)
    assert [budget.seconds for budget in budgets] == [1.0, 4.0, 1.0]
    assert [goals.regret(record) for record in records] == [1.0, 1.0]


@pytest.mark.parametrize("module", [memory, soak, tables, timing])
def test_examples_in_docstrings(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert not result.failed


def test_allocator_compares_medians_of_processes() -> None:
    cases = (Case("LSTM", Shape(2, 4, 3, 5), 0.0),)
    seconds = {"default": (0.004, 0.010, 0.006), "kept": (0.001, 0.002, 0.003)}
    runs = {
        way: [{f"0 {NATIVE}": s, f"0 {AUTO}": 2 * s} for s in found]
        for way, found in seconds.items()
    }
    row = allocator.report(runs, cases).splitlines()[-1]
    assert row == "| LSTM | (2, 4, 3, 5) | 0 | 6 | 2 | 3.00 | 12 | 4 | 3.00 |"


def test_allocator_times_both_contestants_of_every_case() -> None:
    cases = [Case(cell, Shape(2, 4, 3, 5), 0.0) for cell in ("LSTM", "GRU")]
    found = allocator.time_cases(cases, Budget(0.01, 1, 1))
    assert found.keys() == {f"{place} {name}" for place in (0, 1) for name in (NATIVE, AUTO)}

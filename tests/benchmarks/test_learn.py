"""Experiments name tutorials and options that exist, and tables show every seed."""

from __future__ import annotations

import csv
import doctest
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import experiments, learn, popgym_tasks, summary
from benchmarks.experiments import Experiment
from benchmarks.popgym_tasks import GAMES, measure_random
from benchmarks.summary import stratified_interval, summarize, write_overview

VARIANTS = [(name, variant) for name, one in learn.ALL.items() for variant in one.variants]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_experiments_tutorial_reads_every_option(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = learn.ALL[name]
    if experiment.script == "recurrent_mappo":
        pytest.importorskip("vmas", reason="the marl extra is not installed")
    monkeypatch.syspath_prepend(str(learn.ROOT / "tutorials"))
    tutorial: Any = import_module(experiment.script)
    args, _ = tutorial.read_args([*experiment.variants[variant], "--seed", "3"])
    assert args.seed == 3


def make_run(variant: str, seed: int, returns: list[float]) -> Any:
    curve = [{"frames": at, "evaluation": float(at + seed)} for at in (10, 20)]
    result = {"test_returns": returns, "frames": 20, "seconds": 60.0}
    return SimpleNamespace(variant=variant, seed=seed, curve=curve, result=result, cpu_seconds=30.0)


def make_experiment(**options: Any) -> Experiment:
    return Experiment("recurrent_ppo", "Title", "", {"LSTM": ()}, **options)


def test_summarize_shows_the_mean_over_seeds_each_seed_and_the_published_number() -> None:
    runs = [make_run("LSTM", seed, [40.0 * seed, 20.0]) for seed in range(3)]
    one = make_experiment(published={"others": "31"}, references={"random": 1.0})
    row, reference, published = summarize(one, runs).splitlines()[2:]
    assert row.startswith("| LSTM | fresh episodes | 30.0 [")
    assert row.endswith("| 10.0, 30.0, 50.0 | 20 | 1.0 | 0.5 |")
    assert reference == "| random | reference | 1.00 |  |  |  |  |"
    assert published == "| others | published | 31 |  |  |  |  |"


def test_summarize_counts_in_the_unit_of_the_learning_curve() -> None:
    run = make_run("LSTM", 0, [1.0])
    run.curve = [{"episode": 1.0, "evaluation": 0.0}, {"episode": 4.0, "evaluation": 1.0}]
    del run.result["frames"]
    header, _, row = summarize(make_experiment(x="episode"), [run]).splitlines()
    assert header.endswith("| every seed | episodes | minutes | CPU minutes |")
    assert row.endswith("| 1.00 | 4 | 1.0 | 0.5 |")


def test_summarize_with_success_shows_shares() -> None:
    text = summarize(make_experiment(success=0.5), [make_run("LSTM", 0, [1.0, 0.0, 1.0, 0.9])])
    assert "| 0.75 [0.75, 0.75] | 0.75 |" in text


def test_summarize_with_milestones_reads_the_learning_curve_there() -> None:
    runs = [make_run("LSTM", seed, [0.0]) for seed in range(2)]
    text = summarize(make_experiment(milestones=(5, 15)), runs)
    assert "at 5 frames | 10.5 [10.0, 11.0] | 10.0, 11.0 |" in text
    assert "at 15 frames | 20.5 [20.0, 21.0] | 20.0, 21.0 |" in text


def test_summarize_with_solved_counts_variants_by_the_mean_of_their_learning_curve() -> None:
    experiment = make_experiment(solved=16.0)  # curves are 10, 20 plus the seed
    text = summarize(experiment, [make_run("short", 2, [0.0]), make_run("long", 1, [0.0])])
    assert "| short | while training | 17.0 [17.0, 17.0] | 17.0 |" in text
    assert "| long | while training | 16.0 [16.0, 16.0] | 16.0 |" in text
    assert "| variants | solved | 1 of 2 |" in text


@pytest.mark.parametrize("column", ["fresh episodes: mean", "test_mean"])
def test_write_overview_lists_the_experiments_that_have_results(
    column: str, tmp_path: Path
) -> None:
    with (tmp_path / "one.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", column])
        writer.writerows([["LSTM", 0, 100.0], ["LSTM", 1, 300.0]])
    write_overview({"one": make_experiment(), "two": make_experiment()}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| [Title](one.md) | LSTM | 200.0 [100.0, 300.0] | 100.0, 300.0 |  | `one` |" in text
    assert "two.md" not in text


def test_write_overview_shows_published_numbers_and_what_the_feed_forward_network_solves(
    tmp_path: Path,
) -> None:
    tables = {"hard": ("0", "50"), "easy": ("50", "100")}
    for name, baseline in tables.items():
        rows = [("GRU", 0, "50"), ("GRU", 1, "100")]
        rows += [("feed-forward", seed, value) for seed, value in enumerate(baseline)]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("variant", "seed", "fresh episodes: mean"), *rows])
    one = make_experiment(
        published={"others": "31"}, references={"random": 1.0}, scale=(0.0, 100.0)
    )
    write_overview(dict.fromkeys(tables, one), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| [Title](hard.md) | others: 31 | GRU 75.0 (2); feed-forward 25.0 (2) |" in text
    assert "| [Title](hard.md) | reference: random | 1.00 |  | yes | `hard` |" in text
    assert "| [Title](easy.md) | reference: random | 1.00 |  | no | `easy` |" in text
    # Of 50, 100, 50, 100 and of 0, 50, 50, 100, without the lowest and the highest value.
    assert "| recurrent | 0.75 [" in text
    assert "| feed-forward | 0.50 [" in text


def test_write_overview_shows_cells_side_by_side_where_more_than_two_have_run(
    tmp_path: Path,
) -> None:
    tables = {
        "few": ["feed-forward", "GRU", "LSTM"],
        "many": ["GRU", "FFM", "feed-forward", "LSTM"],
    }
    for name, cells in tables.items():
        rows = [(cell, 0, f"{len(cell)}") for cell in cells]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("variant", "seed", "fresh episodes: mean"), *rows])
    write_overview(dict.fromkeys(tables, make_experiment()), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| task | feed-forward | LSTM | GRU | minGRU | LRU | FFM |" in text
    assert "| [Title](many.md) | 12.0 (1) | 4.00 (1) | 3.00 (1) |  |  | 3.00 (1) |" in text
    assert "| [Title](few.md) | 12.0 (1)" not in text


def test_stratified_interval_draws_the_seeds_of_each_task_by_itself() -> None:
    assert stratified_interval([[0.0], [0.0], [1.0], [1.0]]) == (0.5, 0.5)


def test_list_missing_names_the_seeds_without_a_run() -> None:
    one = make_experiment(seeds=range(3))
    runs = [make_run("LSTM", seed, [0.0]) for seed in (0, 2)]
    assert learn.list_missing(one, runs)[0] == "Seeds that have not run yet: LSTM: 1."
    assert learn.list_missing(one, [*runs, make_run("LSTM", 1, [0.0])]) == []


@pytest.mark.parametrize("count", [1, 12])
def test_draw_has_a_color_for_each_variant(count: int, tmp_path: Path) -> None:
    names = [f"N = {one}" for one in range(count)]
    experiment = Experiment("recurrent_ppo", "Title", "", dict.fromkeys(names, ()))
    runs = [make_run(name, 0, [0.0]) for name in names]
    for run in runs:
        run.experiment = experiment
    learn.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_find_names_takes_a_family_by_its_first_word_and_names_by_themselves() -> None:
    mazes = learn.find_names(["t_maze"])
    assert {"t_maze_20", "t_maze_500", "t_maze_50_ppo"} <= set(mazes)
    assert learn.find_names(["r2d2"]) == ["r2d2"]
    with pytest.raises(ValueError, match="no experiment is called t_m: expected recurrent_dqn, "):
        learn.find_names(["t_m"])


WANTED = {"r2d2": [("LSTM", 0), ("LSTM", 1)], "targets_dqn": [("recurrent_loss", 0)]}


def finish_run(one: tuple[str, int], name: str, runs: Path, stop: threading.Event) -> Any:
    return SimpleNamespace(row=lambda: {"variant": one[0], "seed": one[1]}, name=name)


def test_run_all_reports_each_experiment_with_all_its_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports: dict[str, int] = {}
    monkeypatch.setattr(learn, "run", finish_run)
    monkeypatch.setattr(learn, "report", lambda name, runs: reports.update({name: len(runs)}))
    assert learn.run_all(WANTED, 2, tmp_path)
    assert reports == {"r2d2": 2, "targets_dqn": 1}


def test_run_all_stopped_run_reports_nothing_of_its_experiment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(one: tuple[str, int], name: str, runs: Path, stop: threading.Event) -> Any:
        if name == "targets_dqn":
            raise learn.Stopped
        return finish_run(one, name, runs, stop)

    reports: list[str] = []
    monkeypatch.setattr(learn, "run", run)
    monkeypatch.setattr(learn, "report", lambda name, runs: reports.append(name))
    assert not learn.run_all(WANTED, 1, tmp_path)
    assert reports == ["r2d2"]


def test_run_all_failing_run_stops_the_others_and_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped: list[int] = []
    both = threading.Barrier(2)

    def run(one: tuple[str, int], name: str, runs: Path, stop: threading.Event) -> Any:
        both.wait(30)
        if one == ("LSTM", 0):
            raise RuntimeError("it fails")
        if stop.wait(30):
            stopped.append(one[1])
        raise learn.Stopped

    monkeypatch.setattr(learn, "run", run)
    with pytest.raises(RuntimeError, match="it fails"):
        learn.run_all({"r2d2": WANTED["r2d2"]}, 2, tmp_path)
    assert stopped == [1]


def test_run_tutorial_stopped_before_its_first_file_raises_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learn, "run_tutorial", lambda *_: 1.0)
    with pytest.raises(learn.Stopped):
        learn.run(("LSTM", 0), "r2d2", tmp_path)


def test_run_stopped_tutorial_keeps_its_cpu_time_and_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop = threading.Event()

    def run_tutorial(argv: list[str], event: threading.Event) -> float:
        Path(argv[-1]).mkdir(parents=True)
        event.set()
        return 3.0

    monkeypatch.setattr(learn, "run_tutorial", run_tutorial)
    with pytest.raises(learn.Stopped):
        learn.run(("LSTM", 0), "r2d2", tmp_path, stop)
    assert learn.read_cpu_seconds(tmp_path / "r2d2" / "LSTM_0") == 3.0


HANDLES = "import signal\nsignal.signal(signal.SIGINT, lambda *_: exit(0))\nsignal.pause()"
IMPORTS = "import time\ntime.sleep(60)"  # a tutorial that has not come to its loop yet


@pytest.mark.parametrize("program", [HANDLES, IMPORTS], ids=["in its loop", "before its loop"])
def test_run_tutorial_stop_interrupts_the_program(program: str) -> None:
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    assert learn.run_tutorial(["-c", program], stop) > 0


def test_run_tutorial_failing_program_raises_with_its_error() -> None:
    with pytest.raises(RuntimeError, match="ValueError: no"):
        learn.run_tutorial(["-c", "raise ValueError('no')"], threading.Event())


@pytest.mark.parametrize("game", ["BattleshipEasy", "PositionOnlyCartPoleEasy"])
def test_measure_random_agrees_with_the_reference_that_the_table_shows(game: str) -> None:
    (one,) = (one for one in GAMES.values() if one.name == game)
    assert measure_random(game, 300) == pytest.approx(one.random, abs=0.02)


@pytest.mark.parametrize("module", [experiments, learn, popgym_tasks, summary])
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert not result.failed


@pytest.mark.parametrize("name", popgym_tasks.POPGYM)
def test_games_of_popgym_are_made_by_the_options_of_the_tutorial(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(learn.ROOT / "tutorials"))
    tutorial: Any = import_module("recurrent_ppo")
    args, _ = tutorial.read_args([*learn.ALL[name].variants["GRU"]])
    observation = tutorial.make_env(args, 2).reset()["observation"]
    assert observation.shape[0] == 2
    assert observation.ndim == 2

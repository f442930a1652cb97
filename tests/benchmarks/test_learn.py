"""Experiments name tutorials and options that exist, and tables show every seed."""

from __future__ import annotations

import csv
import doctest
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
    assert "| [Title](hard.md) | published: others | 31 |  | yes | `hard` |" in text
    assert "| [Title](hard.md) | reference: random | 1.00 |  | yes | `hard` |" in text
    assert "| [Title](easy.md) | published: others | 31 |  | no | `easy` |" in text
    # Of 50, 100, 50, 100 and of 0, 50, 50, 100, without the lowest and the highest value.
    assert "| recurrent | 0.75 [" in text
    assert "| feed-forward | 0.50 [" in text


def test_stratified_interval_draws_the_seeds_of_each_task_by_itself() -> None:
    assert stratified_interval([[0.0], [0.0], [1.0], [1.0]]) == (0.5, 0.5)


def test_list_missing_names_the_seeds_without_a_run() -> None:
    one = make_experiment(seeds=range(3))
    runs = [make_run("LSTM", seed, [0.0]) for seed in (0, 2)]
    assert learn.list_missing(one, runs)[0] == "Seeds that have not run yet: LSTM: 1."
    assert learn.list_missing(one, [*runs, make_run("LSTM", 1, [0.0])]) == []


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

"""Plots draw the right numbers, and invalid data raise an error."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgba
from tensordict import TensorDict

import rnnkeys
from rnnkeys import plot_episode_states, plot_state_staleness
from rnnkeys.diagnostics import plots, staleness_by_step
from rnnkeys.modules.network import RecurrentNetwork
from tests.support import target_cases as cases
from tests.support import target_oracle as oracle

DQN = next(case for case in cases.CASES if case.name == "DQN double delayed TD0")


def rollout(cell: str = "gru") -> tuple[Any, Any]:
    policy = DQN.make(rnnkeys, cell).policy
    return policy, cases.collect(DQN, policy, 60)


def line(panel: Any, label: str) -> Any:
    [found] = [one for one in panel.get_lines() if one.get_label() == label]
    return torch.as_tensor(found.get_ydata())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_plot_episode_states_draws_norms_and_starts(cell: str) -> None:
    policy, data = rollout(cell)
    figure = plot_episode_states(data, policy)
    norms, gates, reach = figure.axes
    assert norms.get_ylim()[0] == 0 and norms.get_xlim() == gates.get_xlim() == (0, len(data) - 1)
    assert list(figure.get_size_inches()) == pytest.approx([8, 3 * 2.4])
    for key in ("actor_h", "actor_c")[: 2 if cell == "lstm" else 1]:
        torch.testing.assert_close(line(norms, key), data[key].flatten(1).norm(dim=-1))
    drawn = [
        torch.as_tensor(one.get_xdata())[0].item()
        for one in norms.get_lines()
        if one.get_linestyle() == ":"
    ]
    assert drawn == data["is_init"].flatten().nonzero().flatten().tolist()
    drawn = [str(one.get_label()) for one in gates.get_lines()]
    assert drawn[:2] == (["i", "f"] if cell == "lstm" else ["r", "z"])
    assert "age" in reach.get_xlabel()


def test_plot_episode_states_without_policy_finds_states() -> None:
    policy, _ = rollout("lstm")
    data = cases.collect(DQN, policy, 40, (2,))
    [panel] = plot_episode_states(data, row=1).axes
    torch.testing.assert_close(line(panel, "actor_c"), data["actor_c"][1].flatten(1).norm(dim=-1))
    labels = [str(one.get_label()) for one in panel.get_lines()]
    assert {one for one in labels if not one.startswith("_")} == {"actor_h", "actor_c", "start"}


def test_plots_put_the_legend_beside_the_panel_and_count_in_whole_steps() -> None:
    policy, data = rollout()
    [norms, _, reach] = plot_episode_states(data, policy).axes
    [stale] = plot_state_staleness(policy, cases.windows(DQN, policy)).axes
    for panel in (norms, reach, stale):
        legend: Any = panel.get_legend()
        corner = legend.get_bbox_to_anchor().transformed(panel.transAxes.inverted())
        assert (corner.x0, corner.y0) == pytest.approx((1, 1))
        assert legend.get_texts()[0].get_fontsize() < 10
    for panel in (reach, stale):
        assert all(tick == int(tick) for tick in panel.xaxis.get_major_locator().tick_values(0, 2))
    [starts, *_] = [one for one in norms.get_lines() if one.get_linestyle() == ":"]
    assert starts.get_color() == "0.6"
    band: Any = stale.collections[0]
    expected = to_rgba(stale.get_lines()[0].get_color(), 0.15)
    assert tuple(band.get_facecolor()[0]) == pytest.approx(expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gate_saturation_equals_the_equations(cell: str) -> None:
    policy, data = rollout(cell)
    network = RecurrentNetwork(policy)
    [one] = network.layers
    rnn: Any = one.module.layers  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.mul_(12)
    # Stored states belong to these weights too: what enters each step is what was collected.
    data = cases.collect(DQN, policy, 60)
    x, h = data["observation"], data["actor_h"].squeeze(-2)
    gates = x @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
    parts = gates.sigmoid().chunk(4 if cell == "lstm" else 3, -1)
    shares = plots.gate_saturation(network, data, one)
    assert list(shares) == (["i", "f", "o"] if cell == "lstm" else ["r", "z"])
    for name, part in zip(shares, (parts[0], parts[1], parts[-1]), strict=False):
        expected = ((part < 0.05) | (part > 0.95)).float().mean(-1)
        assert 0.1 < expected.mean() < 0.95
        torch.testing.assert_close(shares[name], expected.detach())


def test_gradient_reach_is_the_gradient_by_age() -> None:
    policy, data = rollout()
    network = RecurrentNetwork(policy)
    [one] = network.layers
    starts = data["is_init"].flatten()
    key, reach = plots.gradient_reach(network, data, one, starts)
    assert key == "chosen_action_value"
    age = plots.compute_ages(starts)
    anchors = (age == age.max()).nonzero().flatten()
    total = torch.zeros(len(reach))
    for anchor in anchors.tolist():
        first = anchor - int(age.max())
        x = data["observation"][first : anchor + 1].clone().requires_grad_()
        h = torch.zeros(cases.HIDDEN)
        rnn: Any = one.module.layers  # pyright: ignore[reportAttributeAccessIssue]
        for step in x:
            h = oracle.step(rnn, 0, step, (h,))[0]
        q = policy.module[1].module(h).max()
        total += torch.autograd.grad(q, x)[0].norm(dim=-1).flip(0)
    torch.testing.assert_close(reach, total / total[0])


def test_gradient_reach_is_the_mean_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, data = rollout()
    network = RecurrentNetwork(policy)
    monkeypatch.setattr(plots, "_REACH", 1)
    _, reach = plots.gradient_reach(network, data, network.layers[0], data["is_init"].flatten())
    assert reach.shape == (2,) and reach[0] == 1 and 0 < reach[1] < 1


def test_plot_state_staleness_draws_the_median_by_age() -> None:
    policy, _ = rollout()
    old = cases.windows(DQN, policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    new = cases.windows(DQN, policy)
    [panel] = plot_state_staleness(policy, {"new": new, "old": old}).axes
    assert line(panel, "new").max() < 1e-5 < 1e-4 < line(panel, "old").max()
    found = staleness_by_step(policy, old)
    for age, value in enumerate(line(panel, "old").tolist()):
        assert value == pytest.approx(
            found.difference[found.age == age].quantile(0.5).item(), abs=1e-6
        )
    [panel] = plot_state_staleness(policy, old).axes
    assert line(panel, "stored states").max() > 1e-4
    assert panel.get_ylim()[0] == 0


def test_plots_invalid_data_raise() -> None:
    policy, data = rollout()
    with pytest.raises(ValueError, match="no state to plot.*Pass the policy"):
        plot_episode_states(data.exclude("actor_h"))
    with pytest.raises(ValueError, match="row=1.*has 1 rows"):
        plot_episode_states(data, policy, row=1)
    with pytest.raises(ValueError, match="needs a time dimension"):
        plot_episode_states(data[0], policy)
    with pytest.raises(ValueError, match="holds nothing to plot"):
        plot_state_staleness(policy, {})
    with pytest.raises(KeyError, match="no state 'actor_h'"):
        plot_state_staleness(policy, data.exclude("actor_h"))


def test_plots_without_matplotlib_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    states = TensorDict({"h": torch.zeros(3, 1, 2), "next": {"h": torch.zeros(3, 1, 2)}}, [3])
    with pytest.raises(ImportError, match=r"pip install 'rnnkeys\[plot\]'"):
        plot_episode_states(states.set("is_init", torch.zeros(3, 1).bool()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_plot_episode_states_without_root_states_recomputes_them(cell: str) -> None:
    policy, data = rollout(cell)
    first = int(data["is_init"].flatten().nonzero()[0])
    whole = data[first:]
    keys = ("actor_h", "actor_c")[: 2 if cell == "lstm" else 1]
    [norms, *_] = plot_episode_states(whole.exclude(*keys), policy).axes
    for key in keys:
        torch.testing.assert_close(line(norms, key), whole[key].flatten(1).norm(dim=-1))

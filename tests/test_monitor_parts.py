"""What a summary says of the parts that only some runs have: a critic, and routers of a mixture of experts."""

import pytest
from test_monitor_instruments import knowledge, summary_of, traffic, write

from rlvr.monitor.instruments import read_instruments

# critic


def test_critic_is_judged_by_rollouts_not_by_steps(tmp_path):
    """Ten rollouts of two steps; a rollout's metrics stand in both its records."""
    steps = [knowledge(0.1 * (i // 2), 0.6, 0.5) | {"time/rollout": float(i % 2 == 0)} for i in range(20)]
    found = read_instruments({}, [{"step": i, "metrics": m} for i, m in enumerate(steps)]).critic
    assert (found.first, found.last, found.window) == pytest.approx((0.05, 0.85, 2))
    assert found.bias == pytest.approx(0.1)
    text = summary_of(write(tmp_path, steps))
    assert "explains 5 % of the variance of what is earned at first, 85 % at last" in text
    assert "values 0.100 too high" in text.replace("\n" + 18 * " ", " ")


# routers


def test_routers_are_told_from_first_to_last(tmp_path):
    steps = [traffic(1 - 0.1 * i) for i in range(5)]
    text = summary_of(write(tmp_path, steps)).replace("\n" + 18 * " ", " ")
    assert "routers           Tsallis entropy 1.00 at first, 0.60 at last (mean of 1 step); 50 %, 30 %" in text
    assert "2.5 experts a token; 25 % of the experts are dead" in text

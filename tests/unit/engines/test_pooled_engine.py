"""The state of an engine follows from what happened to it; the gravest decides."""

import pytest

from megatron_rl.engines.pooled_engine import EngineState, PooledEngine


@pytest.mark.parametrize(
    ("facts", "state", "live", "routable"),
    [
        ({}, EngineState.SERVING, True, True),
        ({"paused": True}, EngineState.PAUSED, True, True),
        ({"paused": True, "offloaded": True}, EngineState.OFFLOADED, True, True),
        ({"offloaded": True, "quarantined_because": "not confirmed"}, EngineState.QUARANTINED, True, False),
        ({"quarantined_because": "not confirmed", "lost_because": "no answer"}, EngineState.LOST, False, False),
    ],
)
def test_the_gravest_fact_is_the_state(facts, state, live, routable):
    engine = PooledEngine("http://e", **facts)
    assert (engine.state, engine.live, engine.routable) == (state, live, routable)
    assert str(state) == state.value

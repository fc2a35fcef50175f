"""A process that may not write any more leaves checkpoints as they are."""

import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.trainer.run_control import RunControl
from tests.models import make_qwen3
from tests.parallel.steps import make_policy


@pytest.mark.parametrize("while_writing", [False, True])
def test_an_attempt_that_is_over_writes_no_checkpoint(tmp_path, while_writing):
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    token = run / "control" / "attempt"
    token.write_text('{"token": 1}')
    policy = make_policy(make_qwen3(tmp_path / "model", layers=2, tied=True), {})
    with Checkpoints(run / "checkpoints", policy, keep=1, guard=RunControl(run).check_attempt) as checkpoints:
        checkpoints.save(TrainState(step=1), wait=True)
        assert 0 < checkpoints.save_s[0] < 60
        if while_writing:
            checkpoints.save(TrainState(step=2))
        token.write_text('{"token": 2}')
        with pytest.raises(ConfigError, match="attempt 2 of the run"):
            checkpoints.save(TrainState(step=3), wait=True)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".partial"] == ["step_000001"]

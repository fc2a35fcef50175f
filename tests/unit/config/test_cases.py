"""Every input of the table of configurations has its right outcome, soon."""

import time
from functools import reduce
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.config import Config, load_config
from megatron_rl.errors import ConfigError
from tests.cases.configuration import CASES, ConfigCase

SLOWEST_S = 15  # on a busy machine; most take milliseconds, the largest files 2 s
LONGEST_MESSAGE = 3000


def value_at(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    tree = config.model_dump()
    return reduce(lambda block, name: block[name], key.split("."), tree)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_configuration_is_read_or_refused(case: ConfigCase, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(case.content)
    started = time.monotonic()
    if isinstance(case.right, str):
        with pytest.raises(ConfigError) as refused:
            load_config(file, list(case.overrides))
        message = str(refused.value)
        assert case.right.replace("FILE", str(file)) in message and len(message) < LONGEST_MESSAGE, message[:5000]
    else:
        config = load_config(file, list(case.overrides))
        for key, value in case.right.items():
            found = value_at(config, key)
            assert (str(found) if key == "model.path" else found) == value
        (tmp_path / "again.yaml").write_text(config.dump(), encoding="utf-8")
        assert load_config(tmp_path / "again.yaml") == config, "the resolved configuration is another one"
    assert time.monotonic() - started < SLOWEST_S


PIECES = (
    *"{}[]:,-?&*!|>'\"%@`#~=<.\n\t \\\0é\ufeff",
    *(
        "model: {path: m}\n",
        "run:\n",
        "  steps: ",
        "rollout: {",
        "objective: {name: ",
        "task: {options: ",
        "<<: ",
        "? ",
    ),
    *("&a ", "*a", "!!int ", "!!set ", "!!python/none ", "---\n", "...\n", "0x", "0b1", ".inf", ".nan", "1e5", "~"),
    *("2026-01-01", "999999999999999999999", "true", "null", "\\ud800", "erpd", "math", "[1, 2]", "}}", "\r\n"),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(PIECES), max_size=30).map(lambda parts: "".join(parts).encode()),
        st.lists(st.sampled_from(PIECES), max_size=10).map(
            lambda parts: f"model: {{path: m}}\n{''.join(parts)}".encode()
        ),
    ),
    overrides=st.lists(
        st.tuples(st.sampled_from(["run.steps", "task.options.a", "a.b", "model"]), st.text(max_size=20))
    ),
)
def test_any_bytes_give_a_configuration_or_a_configuration_error(content, overrides, tmp_path):
    file = tmp_path / "fuzz.yaml"
    file.write_bytes(content)
    try:
        config = load_config(file, [f"{key}={value}" for key, value in overrides])
    except ConfigError:
        return
    assert config.dump().encode()

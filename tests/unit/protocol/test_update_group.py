"""The store of an update group listens where the engines are, and nowhere else."""

import psutil
import pytest

from megatron_rl.errors import EngineError
from megatron_rl.protocol.update_group import connect_store, create_store
from megatron_rl.weight_sync.transports.distributed import _meeting_place


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_store_listens_on_one_address(address):
    store = create_store(10, address)
    listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.laddr.port == store.port and not c.raddr}
    assert listening == {address}
    other = connect_store(address, store.port, 2, 10)
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(EngineError, match=r"no update group can meet on 192\.0\.2\.1 of this machine"):
        create_store(1, "192.0.2.1")


def test_engines_meet_at_the_address_that_all_of_them_reach():
    assert _meeting_place({"127.0.0.1"}) == "127.0.0.1"
    assert _meeting_place({"127.0.0.1", "10.0.0.5"}) == "10.0.0.5"
    with pytest.raises(EngineError, match=r"several addresses \(10\.0\.0\.5, 10\.1\.0\.5\)"):
        _meeting_place({"10.0.0.5", "10.1.0.5", "127.0.0.1"})

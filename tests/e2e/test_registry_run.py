"""A run finds its engines in a folder, with a key; one that leaves comes back elsewhere."""

import json

import httpx

from megatron_rl.ports import free_port
from megatron_rl.protocol.api_key import write_private
from tests.e2e.command import records

TRAJECTORIES = 8 * 16


def test_engines_leave_and_come_back_elsewhere_while_a_run_goes_on(
    start, small_run, run_folder, arithmetic_model, tmp_path
):
    registry, key = tmp_path / "engines", tmp_path / "key"
    write_private(key, "letmein")

    def serve(name):
        place = ["--port", free_port(), "--ready-file", registry / f"{name}.json", "--api-key-file", key]
        return start("serve", "--model", arithmetic_model, "--threads", 1, *place)

    first, second = serve("0"), serve("1")
    engines = [f"rollout.urls_dir={registry}", f"rollout.api_key_file={key}", "rollout.servers=2"]
    command = start("train", small_run, *engines, "run.steps=40", "run.save_every=0", "rollout.transport=distributed")
    command.until(lambda: len(records(run_folder)) >= 2)
    url = json.loads((registry / "0.json").read_text())["url"]
    assert httpx.get(f"{url}/model_info", timeout=60, trust_env=False).status_code == 401
    second.interrupt()
    second.wait(30)
    assert not (registry / "1.json").exists()
    second = serve("1")
    elsewhere = second.until(
        lambda: (registry / "1.json").exists() and json.loads((registry / "1.json").read_text())["url"]
    )
    headers = {"Authorization": "Bearer letmein"}

    def version():
        return httpx.get(f"{elsewhere}/model_info", headers=headers, timeout=60, trust_env=False).json()[
            "weight_version"
        ]

    command.until(lambda: version() not in ("default", "0"))
    result = command.wait()
    assert result.code == 0, result.all
    assert f"{elsewhere} is awaited at the next weight update" in result.err
    assert [r["step"] for r in records(run_folder)] == list(range(40))
    assert version() == "41" and first.process.poll() is None
    assert "letmein" not in result.out + result.err + (run_folder / "config.yaml").read_text()

"""The commands report, doctor and eval work on real folders."""

import re
import shutil
from importlib.metadata import version
from pathlib import Path

from megatron_rl.config import load_config
from tests.e2e.command import assert_declared, records


def test_report_redraws_a_run_from_its_log_alone(cli, finished_run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished_run.folder / "log.jsonl", bare)
    result = cli("report", bare)
    assert result.code == 0, result.all
    page = Path(result.out.strip())
    assert page == bare / "report" / "index.html"
    html = page.read_text(encoding="utf-8")
    assert "mean reward" in html and "held-out pass rate, greedy" in html
    pictures = re.findall(r'src="([^"]+)"', html)
    assert pictures
    for picture in pictures:
        assert picture.startswith("data:image/") or (page.parent / picture).is_file(), f"{picture[:80]} is not there"
    assert not re.search(r'(src|href)="https?://', html), "a report must be readable without a network"


def test_every_key_of_a_run_s_log_is_declared(finished_run):
    assert_declared(finished_run.folder)


def test_config_prints_what_the_run_was_given_and_every_default(cli, small_run, tmp_path):
    result = cli("config", small_run, "run.seed=7")
    assert result.code == 0, result.all
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.out, encoding="utf-8")
    assert load_config(printed) == load_config(small_run, ["run.seed=7"])
    assert "  # tokens before rollout.max_new_tokens" in result.out


def test_doctor_tells_versions_and_what_they_mean(cli):
    result = cli("doctor")
    assert result.code == 0, result.all
    for word in ("megatron-core", version("megatron-core"), "torch", "layer spec"):
        assert word in result.out
    assert "warning" not in result.out


def test_doctor_warns_of_a_package_that_only_shares_apex_s_name(cli, tmp_path):
    impostor = tmp_path / "impostor"
    (impostor / "apex").mkdir(parents=True)
    (impostor / "apex" / "__init__.py").write_text('raise RuntimeError("doctor must not run what it looks at")\n')
    result = cli("doctor", PYTHONPATH=str(impostor))
    assert result.code == 0, result.all
    assert "warning: a package called 'apex' without NVIDIA's kernels" in result.out


def test_doctor_checks_a_configuration(cli, small_run):
    result = cli("doctor", "--config", small_run)
    assert result.code == 0 and f"{small_run}: can run" in result.out.replace("\n", ""), result.all


def test_doctor_sync_finds_agreement_at_equal_precision_and_a_mismatch_in_four_bits(cli, small_run, tmp_path):
    before = sorted(tmp_path.glob("*.yaml"))
    agree = cli("doctor", "--sync", small_run, "rollout.colocate=true")
    assert "colocation: rank 0 frees" in agree.out, "the sides take turns as in a run"
    assert agree.code == 0 and "verdict: trainer and engines agree" in agree.out, agree.all
    errors = [float(found) for found in re.findall(r"tokens, k3 in nats a token (\S+),", agree.out)]
    assert len(errors) == 2 and max(errors) < 1e-6, "twice, so that a weight update is between the two"
    four_bits = ["precision.train=bf16", "precision.rollout=nvfp4", "precision.rollout_activations=fp4"]
    apart = cli("doctor", "--sync", small_run, *four_bits)
    assert apart.code == 1 and "ABOVE 1.05 (NeMo-RL" in apart.out and "DISAGREE" in apart.out, apart.all
    assert sorted(tmp_path.glob("*.yaml")) == before and not (tmp_path / "runs").exists(), "nothing is left behind"


def test_eval_prints_the_pass_rates_of_the_model_it_is_given(cli, small_run, finished_run):
    """The exported model has the greedy pass rate that the last weights had inside the run."""
    result = cli("eval", small_run, "eval.prompts=2", "eval.samples=32", f"model.path={finished_run.folder / 'hf'}")
    assert result.code == 0, result.all
    rates = {name: float(rate) for name, rate in re.findall(r"^eval/(\w+): ([\d.]+)%$", result.out, re.MULTILINE)}
    assert rates.keys() == {"greedy", "sampled"} and 0 <= rates["sampled"] <= 100
    assert rates["greedy"] == 100 * records(finished_run.folder, "eval")[-1]["eval/greedy"]

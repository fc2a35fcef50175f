"""A run with loggers: one of the user that fails, and W&B offline, which goes on after the resume."""

from megatron_rl.diagnostics.samples import read_shown_samples
from tests.e2e.command import assert_refused, records

FAILS = """\
class Mine:
    def start(self, config, folder, resume_from):
        self.file = (folder / "mine.txt").open("a")

    def log(self, record):
        self.file.write(f"{record['kind']} {record['step']}\\n")
        if record["step"] == 1:
            raise ConnectionError("the database is away")

    def close(self):
        self.file.close()
"""


def test_a_logger_that_fails_ends_the_run_without_loss_and_the_run_goes_on_without_it(cli, small_run, run_folder):
    (small_run.parent / "mine.py").write_text(FAILS)
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    options = ["run.steps=3", "run.show_samples=1", "rollout.record_logmu=true"]
    result = cli("train", small_run, "run.loggers=[wandb, mine.py:Mine]", "parallel.tensor=2", *options, **offline)
    assert result.code == 2, result.all
    assert "UserError: logger" in result.err and "Traceback" not in result.err, result.all
    assert "mine.py:Mine failed on the step record of step 1 (ConnectionError: the database is away)" in result.err
    assert [record["step"] for record in records(run_folder)] == [0, 1]
    assert (run_folder / "mine.txt").read_text() == "step 0\nstep 1\n"
    run_id = (run_folder / "wandb_id").read_text()
    result = cli("train", "--resume", small_run, "run.loggers=[wandb]", *options, **offline)
    assert result.code == 0, result.all
    assert [record["step"] for record in records(run_folder)] == [0, 1, 2]
    files = list(run_folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{run_id}.wandb"}
    samples = read_shown_samples(run_folder)
    assert [sample.step for sample in samples] == [step for step in range(3) for _ in range(16)]
    assert all(sample.k3 is not None and 0 <= sample.k3 < 1 for sample in samples)
    assert "Most mismatched" in (run_folder / "report" / "index.html").read_text()


def test_a_logger_that_cannot_work_is_refused_before_anything_starts(refused, small_run, run_folder):
    (small_run.parent / "mine.py").write_text(FAILS.replace("def log(self, record)", "def log(self)"))
    result = refused("train", small_run, "run.loggers=[mine.py:Mine]")
    assert_refused(result, "ConfigError", f"{small_run.parent}/mine.py:5: Mine.log is called as log(record)")
    assert not run_folder.exists()

"""Without a terminal, progress is one plain line per step, from rank 0 only."""

from megatron_rl.trainer.progress import ProgressLine

RECORD = {"step": 1, "reward/mean": 0.25, "kl/k3": 1.5e-3, "tokens_per_s": 12345.6}


def test_a_step_is_one_plain_line(capsys):
    with ProgressLine("small", 4, 0, enabled=True) as progress:
        progress.step(RECORD)
        progress.note("a note")
    assert capsys.readouterr().out == "small 2/4 | reward 0.250 | KL 1.50e-03 | 12,346 tok/s\na note\n"


def test_a_step_without_ratios_claims_none(capsys):
    with ProgressLine("small", 4, 0, enabled=True) as progress:
        progress.step({name: value for name, value in RECORD.items() if name != "kl/k3"})
    assert capsys.readouterr().out == "small 2/4 | reward 0.250 | 12,346 tok/s\n"


def test_other_ranks_are_silent(capsys):
    with ProgressLine("small", 4, 0, enabled=False) as progress:
        progress.step(RECORD)
        progress.note("a note")
    assert capsys.readouterr().out == ""

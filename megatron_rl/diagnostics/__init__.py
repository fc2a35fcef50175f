"""Diagnostics: statistics of the trainer-engine mismatch, and the run log they are written to."""

from megatron_rl.diagnostics.mismatch import ratio_record
from megatron_rl.diagnostics.runlog import RunLog, read_log

__all__ = ["RunLog", "ratio_record", "read_log"]

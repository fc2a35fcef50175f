"""Loggers: places beside `log.jsonl` that the records of a run go to, chosen by `run.loggers`."""

from megatron_rl.loggers.load_loggers import check_loggers, start_loggers

__all__ = ["check_loggers", "start_loggers"]

"""Reports: plots and one HTML page, drawn from a run folder only."""

from megatron_rl.report.html import write_report
from megatron_rl.report.plots import plot_summary

__all__ = ["plot_summary", "write_report"]

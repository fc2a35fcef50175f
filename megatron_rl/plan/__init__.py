"""Plans: what a configuration requires, resolved before anything is allocated."""

from megatron_rl.plan.algorithm_plan import AlgorithmPlan, plan_algorithm
from megatron_rl.plan.run_plan import RunPlan, print_plan, resolve_run

__all__ = ["AlgorithmPlan", "RunPlan", "plan_algorithm", "print_plan", "resolve_run"]

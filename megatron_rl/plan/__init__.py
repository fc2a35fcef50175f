"""Plans: what a configuration requires, resolved before anything is allocated."""

from megatron_rl.plan.algorithm_plan import AlgorithmPlan, plan_algorithm

__all__ = ["AlgorithmPlan", "plan_algorithm"]

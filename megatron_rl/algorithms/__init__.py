"""Algorithms: how a step of each method collects its batch and learns from it."""

from megatron_rl.algorithms.erpd.round import ERPD
from megatron_rl.algorithms.policy_gradient import PolicyGradient
from megatron_rl.plan import AlgorithmPlan
from megatron_rl.trainer.algorithm import Algorithm


def make_algorithm(plan: AlgorithmPlan) -> Algorithm:
    """Return the algorithm of a plan."""
    return PolicyGradient(plan.objective) if plan.erpd is None else ERPD(plan.erpd)

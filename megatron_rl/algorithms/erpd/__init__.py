"""ERPD: Extreme Region Policy Distillation (arXiv 2605.25582), one round a step."""

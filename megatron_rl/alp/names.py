"""The name of a perturbation's scale in a model, to distinguish it from the weights."""

LOG_SIGMA = "log_sigma"


def is_sigma(name: str) -> bool:
    """Return True if the parameter `name` is the scale of a perturbation. Model folders and engines have none."""
    return name.rpartition(".")[2] == LOG_SIGMA

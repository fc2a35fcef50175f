"""What the scale of a perturbation is called in a model, for those who must tell it from the weights."""

LOG_SIGMA = "log_sigma"


def is_sigma(name: str) -> bool:
    """Whether a parameter of a model is the scale of a perturbation: no model folder and no engine knows of it."""
    return name.rpartition(".")[2] == LOG_SIGMA

"""How many rounds and iterations, and how the policy is evaluated."""

from configs.base import PositiveInt, Section


class EvaluationConfig(Section):
    """The evaluation before and after, on held-out prompts."""

    num_prompts: PositiveInt = 256
    bootstrap_resamples: PositiveInt = 2000


class RoundsConfig(Section):
    """The schedule of rounds."""

    count: PositiveInt = 1
    iterations: PositiveInt = 100
    """Iterations (generate, score, learn, publish) in each round."""
    evaluation: EvaluationConfig = EvaluationConfig()

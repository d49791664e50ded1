"""What can go wrong in a rollout worker. Each error keeps its one message, so that it survives pickling."""


class StaleWeightsError(RuntimeError):
    """Refuse to sample: the worker cannot prove that it holds the version that was asked for."""


class WeightMismatchError(RuntimeError):
    """Report weights that are not what the manifest says: a bucket, a tensor or the sum of all parameters."""


class InvalidRolloutError(RuntimeError):
    """Report an engine output that must not be trained on; the message names the rollout's key."""


class EngineFailedError(RuntimeError):
    """Report that the engine itself failed. Nothing that it does from here on can be trusted."""

"""An exported policy that one rank holds in plain memory, so that it can be published again under its own version."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learner.models import PolicyModel
from learner.training import RankContext


class StoredPolicy:
    """A policy without optimiser or ranks; what `weight_sender` needs of a network.

    Args:
        policy: The network.
        context: The rank that holds it.
    """

    def __init__(self, policy: PolicyModel, context: RankContext) -> None:
        self.context = context
        self.module: nn.Module = policy.to(context.device).eval()

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network without gradient."""
        return self.module(*args, **kwargs)

    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """Give the shape of every parameter, by name; tied ones once."""
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return parameters by name."""
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name].detach() for name in names}

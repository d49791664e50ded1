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
        # In plain memory: the accelerator may be full of what it learns with.
        self.context = RankContext(rank=context.rank, world_size=1, device=torch.device("cpu"))
        policy.network.set_attn_implementation("sdpa")  # what an accelerator's kernels do, a CPU does not
        self.module: nn.Module = policy.to("cpu").eval()

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

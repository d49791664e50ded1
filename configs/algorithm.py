"""How the policy is updated: one class per algorithm, chosen by `algorithm.name`."""

from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from configs.algorithm_base import OF_PPO_ALONE, OF_THE_KL, OF_THE_RATIO, AlgorithmBase
from configs.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from configs.correction import CorrectionConfig
from configs.kl import KLControllerConfig, KLEstimator
from configs.rollout import RolloutConfig
from configs.selection import SelectionConfig

AdvantageNorm = Literal["none", "batch_std_only", "whiten"]

_WITHOUT_RATIO: dict[str, str] = OF_PPO_ALONE | dict.fromkeys(
    OF_THE_RATIO, "its loss has no ratio to the policy before the step"
)


class PolicyGradientBase(AlgorithmBase):
    """What the algorithms have in common that weigh each token by an advantage."""

    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """What a token's advantage is. `gae`: by a critic. The others need none, and none is built: the response's reward
    minus the mean over the prompt's other responses (`rloo`), over the batch (`reinforce`), or over the prompt's
    responses and divided by their standard deviation (`grpo`), the same for every token. Without a critic the default
    of `adv_norm` is `batch_std_only` where it would be `whiten`, and `none` for `grpo`."""
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    """Of `gae`."""
    truncated_value: Literal["terminal", "bootstrap", "drop"] = "terminal"
    """What follows a response that was cut at the length limit: nothing, or the critic's estimate; `drop` learns as if
    it had not been in the batch, only the KL is that of all responses. With `rloo` and `grpo`, a response that is then
    the only one left of its prompt has nothing to be compared with and is dropped too."""
    score_at: Literal["last_token", "after_last_token"] = "last_token"
    """Of `gae`: which token's reward holds the score. `after_last_token` (EOS+1): the score is of the state after the
    response, and the critic learns that state's value too; the policy does nothing there, so that the last token learns
    of the score by gamma * gae_lambda, and of the critic's forecast of it by the rest."""
    whiten_rewards: bool = False
    """Of `gae`: divide the tokens' rewards, KL penalty included, by their standard deviation over the batch, about
    their mean, which stays. With it a constant reward a token is shrunk less than what varies, so that length counts
    for more or less than before; values, and with them `value_clip`, are in units of that deviation, which is small
    where responses are long: a score of deviation 1 on one token in 56 is worth 7.5."""
    alarm_negative_kl: PositiveInt = 3
    """An incident is written where the mean k1 per sequence was below zero by more than chance (two standard errors)
    in so many iterations in a row."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"] = "token_mean"
    critic_warmup_iterations: NonNegativeInt = 0
    """Iterations at the start that train the critic alone; without a critic there are none."""
    correction: CorrectionConfig = CorrectionConfig()
    adv_norm_over: Literal["batch", "minibatch"] = "batch"
    """Whose mean and deviation `adv_norm = whiten` takes: the batch's, once, or (as the APA paper's released code does)
    those of each minibatch over all ranks, so that an advantage depends on who shares the step."""
    repeat_minibatch: bool = False
    """Each minibatch is stepped `num_epochs` times in a row before the next one (as in the APA paper's released code),
    instead of reshuffled passes."""

    @property
    def compares_by(self) -> str | None:
        """The setting by which responses to one prompt are compared with each other; None where they are not."""
        return f"algorithm.advantage = {self.advantage}" if self.advantage in ("rloo", "grpo") else None

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.advantage == "gae"

    @model_validator(mode="before")
    @classmethod
    def _norm_of_whole_responses(cls, values: Any) -> Any:
        """Without a critic, keep the sign of advantages by default, and refuse to move what siblings were compared by.

        All tokens of a response have its advantage, so the mean over tokens is nearer to long responses', and to
        subtract it makes losers of short winners.
        """
        given = cast(dict[str, Any], values) if isinstance(values, dict) else {}
        estimator = given.get("advantage")
        if estimator not in ("rloo", "grpo", "reinforce"):
            return cast(object, values)
        if estimator != "reinforce" and given.get("adv_norm") == "whiten":
            raise ValueError(
                f"adv_norm = whiten subtracts the mean over tokens, in which long responses count for more, from what "
                f"{estimator} has compared within a prompt; use batch_std_only or none"
            )
        if cls.model_fields["adv_norm"].default == "whiten":
            given = {"adv_norm": "none" if estimator == "grpo" else "batch_std_only"} | given
        return cast(object, given)

    @property
    def warmup_iterations(self) -> int:
        """Iterations at the start in which the policy is left as it is."""
        return self.critic_warmup_iterations if self.has_critic else 0

    def trouble(self, rollout: RolloutConfig) -> str | None:
        """Say what nothing can be learned by from what is sampled; None where there is no such thing."""
        alone = "of rollout.responses_per_iteration = 1"
        if rollout.responses_per_iteration == 1 and self.advantage == "reinforce":
            return (
                f"advantage = reinforce compares a response with the mean of its batch, and in a batch {alone} it is "
                "that mean, so that every advantage is 0: sample more"
            )
        if rollout.responses_per_iteration == 1 and dict(self)["adv_norm"] == "whiten":
            return (
                f"adv_norm = whiten over a batch {alone} subtracts how good the response was and keeps only how its "
                "tokens differ: sample more, or use adv_norm = none"
            )
        problem = self.correction.trouble(is_truncated=rollout.truncates_distribution)
        return None if problem is None else f"correction: {problem}"

    @model_validator(mode="after")
    def _advantage_knows_its_means(self) -> Self:
        if self.has_critic:
            return self
        if self.gamma != 1.0:
            raise ValueError(
                f"gamma = {self.gamma} discounts by token, but advantage = {self.advantage} gives all tokens of a "
                "response the same; use gamma = 1 or advantage = gae"
            )
        if self.truncated_value == "bootstrap":
            raise ValueError(
                f"truncated_value = bootstrap needs a critic's estimate, and advantage = {self.advantage} has no critic"
            )
        # A default may have been spelled out by a file that this switches from; anything else is meant to do something.
        for key in ("gae_lambda", "value_clip"):
            value, default = dict(self)[key], type(self).model_fields[key].default
            if value not in (None, default):
                raise ValueError(
                    f"{key} = {value} is of the critic, and advantage = {self.advantage} has none: use "
                    "advantage = gae, or leave it out"
                )
        if self.score_at == "after_last_token" or self.whiten_rewards:
            raise ValueError(
                f"score_at and whiten_rewards say how rewards lie on tokens, but advantage = {self.advantage} compares "
                "whole responses: leave both out, or use advantage = gae"
            )
        return self

    @model_validator(mode="after")
    def _steps_have_what_they_need(self) -> Self:
        adv_norm = dict(self)["adv_norm"]
        if self.adv_norm_over == "minibatch" and adv_norm != "whiten":
            raise ValueError(
                f"adv_norm_over = minibatch says whose moments whitening takes, and adv_norm = {adv_norm} does not "
                "whiten: use adv_norm = whiten, or adv_norm_over = batch"
            )
        if self.adv_norm_over == "minibatch" and self.minibatch_responses == 1:
            lost = (
                "subtracts how good the response was and keeps only how its tokens differ"
                if self.has_critic
                else "leaves nothing to learn, since all tokens of a response have the same advantage"
            )
            raise ValueError(
                f"adv_norm_over = minibatch with minibatch_responses = 1 whitens within one response, which {lost}: "
                "use more, or adv_norm_over = batch"
            )
        if self.repeat_minibatch and self.one_pass:
            raise ValueError(
                "repeat_minibatch takes each minibatch several times, and this algorithm makes one pass over fresh "
                "samples: leave it out"
            )
        if self.repeat_minibatch and self.num_epochs == 1:
            raise ValueError(
                "repeat_minibatch takes each minibatch num_epochs times in a row, and num_epochs = 1: use two or more, "
                "or repeat_minibatch = false"
            )
        return self

    @model_validator(mode="after")
    def _rewards_mean_one_thing(self) -> Self:
        if self.score_at == "after_last_token" and self.truncated_value == "bootstrap":
            raise ValueError(
                "score_at = after_last_token makes the value after the last token a forecast of the score, and "
                "truncated_value = bootstrap takes it for what would have followed the score; choose one of the two"
            )
        if self.whiten_rewards and dict(self)["adv_norm"] == "none":
            unitless = [f"{self.name}_lambda"] if isinstance(self, APAConfig | AWRConfig) else []
            unitless += ["kl_beta"] if isinstance(self, PenalizedBase) and self.kl_in == "loss" else []
            if unitless:
                raise ValueError(
                    f"whiten_rewards divides by a scale of each batch's own, which would take the units from "
                    f"{' and '.join(unitless)} where adv_norm = none; leave it out, or normalise advantages"
                )
        return self

    @model_validator(mode="after")
    def _bypass_needs_a_ratio(self) -> Self:
        if self.correction.old_policy == "behavior" and not isinstance(self, PPOConfig):
            raise ValueError(
                "correction.old_policy = behavior changes what PPO's ratio is taken against, and this algorithm has no "
                "ratio; use correction.weight"
            )
        return self


class PenalizedBase(PolicyGradientBase):
    """What the algorithms have in common that are held to the reference by a penalty of their own."""

    kl_beta: NonNegativeFloat = 0.05
    """The KL coefficient (its first value, where the controller adapts it), in units of the score; in the loss, in
    those of the normalised advantages."""
    kl_controller: KLControllerConfig = KLControllerConfig()
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is charged: token by token in the reward, or as a term of the loss."""
    kl_estimator: KLEstimator = "k1"
    """k1 = lr for the reward; k2 = lr^2 / 2 for the loss, where its gradient is that of KL(policy || reference). k3 in
    the loss has the gradient of the KL the other way round; `k3+` has the value of k3 and the gradient of k2."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Coefficient of the mean entropy per token, which is subtracted from the loss."""

    @model_validator(mode="after")
    def _estimator_works_there(self) -> Self:
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator = {self.kl_estimator} in the reward has almost no KL gradient near the reference, so "
                "the penalty would not hold the policy; use k1 in the reward, or kl_in = loss"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator = k1 in the loss has an expected gradient of zero, so the penalty would do nothing; "
                "use kl_estimator = k2 (or k3+)"
            )
        return self


class PPOConfig(PenalizedBase):
    """Proximal policy optimisation with clipped ratios."""

    name: Literal["ppo"] = "ppo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """An upper bound on -ratio * advantage for negative advantages, as a multiple of the advantage."""
    max_approx_kl: PositiveFloat | None = None
    """The policy takes no further step in an iteration after one whose minibatch was further than this from the policy
    before the first step: mean k2 per token, in nats."""
    value_clip: PositiveFloat | None = 0.2
    adv_norm: AdvantageNorm = "whiten"
    ptx_coefficient: NonNegativeFloat = 0.0
    """Above zero this is PPO-ptx: in every step, the gradient of so many times the mean negative log-likelihood per
    token of texts of `data.pretraining` is added. InstructGPT's 27.8 is a place to start from only."""
    ptx_texts: PositiveInt = 64
    """Pretraining texts in one optimiser step, over all ranks."""


class APAConfig(PolicyGradientBase):
    """Advantage-induced policy alignment: squared error between log-probs and the advantage-tilted reference."""

    not_here = (
        _WITHOUT_RATIO
        | dict.fromkeys(
            OF_THE_KL, "its loss holds the policy to the reference by itself, and apa_lambda is the weight of that KL"
        )
        | {"entropy_bonus": "its loss has a target for every log-prob, to which a bonus would be in the way"}
    )
    name: Literal["apa"] = "apa"
    apa_lambda: PositiveFloat = 0.5
    """The KL weight, in units of the score (one standard deviation of reference samples); with `advantage = grpo`, of
    the standard deviation among each prompt's own responses."""
    num_epochs: PositiveInt = 2
    value_clip: PositiveFloat | None = None
    """None, and nothing else: APA's critic fits the returns by their squared error."""
    adv_norm: AdvantageNorm = "none"
    """Anything but "none" takes the units from apa_lambda; `whiten` is what the paper's released code does."""

    @model_validator(mode="after")
    def _critic_is_not_clipped(self) -> Self:
        if self.value_clip is not None:
            raise ValueError(
                f"value_clip = {self.value_clip} has no meaning for this algorithm: APA's critic fits the returns by "
                "their squared error, and neither the policy's step nor the critic's is clipped; leave it out"
            )
        return self


class AWRConfig(PenalizedBase):
    """Advantage-weighted regression: likelihood of the own samples, weighted by exponentiated advantages.

    Nothing in it holds the policy near the reference, and every weight is positive, so that the entropy falls until
    nothing is left of it; a `kl_beta` above zero is an anchor that the published algorithm does not have.
    """

    not_here = _WITHOUT_RATIO
    name: Literal["awr"] = "awr"
    awr_lambda: PositiveFloat = 1.0
    """The temperature of the weights, in units of the normalised advantages."""
    max_weight: PositiveFloat | None = 20.0
    num_epochs: PositiveInt = 2
    kl_beta: NonNegativeFloat = 0.0
    value_clip: PositiveFloat | None = None
    adv_norm: AdvantageNorm = "whiten"


class A2CConfig(PenalizedBase):
    """Advantage actor-critic: the plain policy gradient, without a ratio, for fresh samples."""

    not_here = _WITHOUT_RATIO
    one_pass: ClassVar[bool] = True
    name: Literal["a2c"] = "a2c"
    value_clip: PositiveFloat | None = None
    adv_norm: AdvantageNorm = "whiten"

    @model_validator(mode="after")
    def _samples_are_fresh(self) -> Self:
        if self.num_epochs > 1:
            raise ValueError(
                f"num_epochs = {self.num_epochs}: the loss of a2c has no ratio to the policy that sampled, so that a "
                "second pass would take old samples for fresh ones; use num_epochs = 1, or ppo, which has the ratio"
            )
        return self


PolicyGradientConfig = PPOConfig | APAConfig | AWRConfig | A2CConfig
AlgorithmConfig = Annotated[PolicyGradientConfig | SelectionConfig, Field(discriminator="name")]

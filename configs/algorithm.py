"""How the policy is updated: one class per algorithm, chosen by `algorithm.name`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from configs.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from configs.rollout import RolloutConfig

AdvantageNorm = Literal["none", "batch_std_only", "whiten"]
KLEstimator = Literal["k1", "k2", "k3"]


class KLControllerConfig(Section):
    """How the KL coefficient moves between iterations."""

    kind: Literal["fixed", "adaptive", "doubling"] = "fixed"
    """`adaptive`: in proportion to the distance from the target, by little each time (Ziegler et al.); `doubling`: to
    half or twice where the KL is off by more than a factor of 1.5 (the PPO paper)."""
    target_nats_per_sequence: PositiveFloat = 6.0
    """The target for the mean over sequences of the summed k1 estimate."""
    horizon_episodes: PositiveInt = 10_000
    """Responses over which the adaptive controller may change the coefficient by about 20%."""


class CorrectionConfig(Section):
    """What the loss makes of samples that another policy drew: an older version, or the engine's other numerics.

    w_t = pi_old / mu, where mu is the policy as the engine ran it and pi_old the learner's before the first step.
    """

    weight: Literal["none", "full", "tis", "clamp", "icepop", "sequence_mask", "sequence_tis"] = "none"
    """What every token's loss is multiplied by. `full`: w, which makes PPO the decoupled PPO; `tis`: min(w, high);
    `clamp`: w within [low, high]; `icepop`: w, but 0 outside [low, high]; `sequence_mask`: w, but 0 for responses whose
    geometric mean of w is outside [low, high]; `sequence_tis`: min(product over the response, high). APA and AWR, which
    have no ratio, take it for tokens of older versions only."""
    low: PositiveFloat = 0.5
    high: PositiveFloat = 2.0
    old_policy: Literal["recomputed", "behavior"] = "recomputed"
    """What PPO's ratio is taken against: the learner's own log-probs from before the first step, or (`behavior`, called
    bypass) those that the engine recorded."""
    alarm_k3: PositiveFloat = 1e-3
    """An incident is written where the mean k3 between engine and learner, over tokens of this very version, is above
    this."""

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be less than high = {self.high}")
        if self.old_policy == "behavior" and self.weight != "none":
            raise ValueError(
                f"weight = {self.weight} with old_policy = behavior would count the same ratio twice: pi / mu already "
                "holds pi_old / mu; choose one of the two"
            )
        return self


_OF_THE_KL = ("kl_beta", "kl_controller", "kl_in", "kl_estimator")
_OF_THE_RATIO = ("clip_low", "clip_high", "dual_clip", "max_approx_kl")
_OF_PPO_ALONE: dict[str, str] = dict.fromkeys(("ptx_coefficient", "ptx_texts"), "only ppo rehearses pretraining texts")
_WITHOUT_RATIO: dict[str, str] = _OF_PPO_ALONE | dict.fromkeys(
    _OF_THE_RATIO, "its loss has no ratio to the policy before the step"
)
_WITHOUT_ADVANTAGES: dict[str, str] = (
    _OF_PPO_ALONE
    | dict.fromkeys(
        ("advantage", "gamma", "gae_lambda", "truncated_value", "critic_warmup_iterations", "adv_norm", "value_clip"),
        "it compares a prompt's responses by their scores, so that there are no advantages and no critic",
    )
    | dict.fromkeys(
        ("correction", *_OF_THE_RATIO), "it learns whole responses, without a ratio to the policy that sampled them"
    )
    | {"entropy_bonus": "its loss is of whole responses", "aggregation": "its loss says how tokens are weighed"}
)


class AlgorithmBase(Section):
    """What all algorithms have in common."""

    responses_together: ClassVar[int] = 1
    """Responses that one term of the loss needs at once, in one micro-batch."""

    not_here: ClassVar[Mapping[str, str]] = {}
    """Key of another algorithm -> why it has no meaning for this one, which "unknown key" would not say."""

    minibatch_responses: PositiveInt = 64
    """Responses in one optimiser step, over all ranks."""
    num_epochs: PositiveInt = 1
    """Passes over the responses of an iteration, reshuffled each time."""

    @model_validator(mode="before")
    @classmethod
    def _no_key_without_a_meaning(cls, values: Any) -> Any:
        for key in cast(dict[str, Any], values) if isinstance(values, dict) else {}:
            if key in cls.not_here:
                raise ValueError(f"{key} has no meaning for this algorithm: {cls.not_here[key]}")
        return cast(object, values)

    @property
    def compares_by(self) -> str | None:
        """The setting by which responses to one prompt are compared with each other; None where they are not."""
        return None

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return False

    @property
    def warmup_iterations(self) -> int:
        """Iterations at the start in which the policy is left as it is."""
        return 0

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count the responses that an iteration learns from, at most."""
        return rollout.responses_per_iteration


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
    truncated_value: Literal["terminal", "bootstrap"] = "terminal"
    """What follows a response that was cut at the length limit: nothing, or the critic's estimate."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"] = "token_mean"
    critic_warmup_iterations: NonNegativeInt = 0
    """Iterations at the start that train the critic alone; without a critic there are none."""
    correction: CorrectionConfig = CorrectionConfig()

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
    the loss has the gradient of the KL the other way round."""
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
                "use kl_estimator = k2"
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
            _OF_THE_KL, "its loss holds the policy to the reference by itself, and apa_lambda is the weight of that KL"
        )
        | {"entropy_bonus": "its loss has a target for every log-prob, to which a bonus would be in the way"}
    )
    name: Literal["apa"] = "apa"
    apa_lambda: PositiveFloat = 0.5
    """The KL weight, in units of the score (one standard deviation of reference samples)."""
    num_epochs: PositiveInt = 2
    value_clip: PositiveFloat | None = None
    adv_norm: AdvantageNorm = "none"
    """Anything but "none" takes the units from apa_lambda; `whiten` is what the paper's released code does."""


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
    name: Literal["a2c"] = "a2c"
    value_clip: PositiveFloat | None = None
    adv_norm: AdvantageNorm = "whiten"


class SelectionBase(AlgorithmBase):
    """What the algorithms have in common that choose among the responses to a prompt, and need no advantages."""

    @property
    def compares_by(self) -> str | None:
        """The setting by which responses to one prompt are compared with each other."""
        return f"algorithm.name = {type(self).model_fields['name'].default}"


class DPOConfig(SelectionBase):
    """Direct preference optimisation, online: the best of a prompt's responses against the worst, by score."""

    responses_together: ClassVar[int] = 2
    not_here = _WITHOUT_ADVANTAGES | dict.fromkeys(
        _OF_THE_KL, "its loss holds the policy to the reference by itself, and dpo_beta is the coefficient of that KL"
    )

    name: Literal["dpo"] = "dpo"
    dpo_beta: PositiveFloat = 0.1
    """The KL coefficient, in units of the implicit reward per nat."""
    kind: Literal["dpo", "cdpo", "robust", "ipo"] = "dpo"
    """`cdpo` and `robust` know that a score may prefer the wrong response, with `flip_probability`; `ipo` aims at a
    margin of 1 / (2 dpo_beta) nats and no further."""
    flip_probability: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Of `cdpo` and `robust`."""

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count two responses of each prompt; a prompt whose responses all tie gives none."""
        return 2 * rollout.prompts_per_iteration

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        if self.minibatch_responses % 2:
            raise ValueError(
                f"minibatch_responses = {self.minibatch_responses} is odd, and a pair counts two: use an even number"
            )
        return self

    @model_validator(mode="after")
    def _flips_are_used(self) -> Self:
        takes_flips = self.kind in ("cdpo", "robust")
        if takes_flips and self.flip_probability == 0:
            raise ValueError(f"kind = {self.kind} without a flip_probability is kind = dpo: set one above 0")
        if not takes_flips and self.flip_probability > 0:
            raise ValueError(
                f"flip_probability = {self.flip_probability:g} is not read by kind = {self.kind}: use cdpo or robust"
            )
        return self


class RFTConfig(SelectionBase):
    """Rejection-sampling fine-tuning: imitate the best of each prompt's responses, and those chosen before."""

    not_here = _WITHOUT_ADVANTAGES | dict.fromkeys(
        _OF_THE_KL, "it imitates its best samples, and how far an iteration goes is up to learning rate and num_epochs"
    )

    name: Literal["rft"] = "rft"
    kept_per_prompt: PositiveInt = 1
    """The best so many responses to each prompt are learned, and remembered for later iterations and rounds."""
    memory_responses: NonNegativeInt = 64
    """Remembered responses that each iteration learns once more, chosen at random; fewer while there are not as many.
    0 forgets: policies trained on their newest samples alone have lost what they could do before."""

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count the chosen responses and the remembered ones."""
        return self.kept_per_prompt * rollout.prompts_per_iteration + self.memory_responses


PolicyGradientConfig = PPOConfig | APAConfig | AWRConfig | A2CConfig
SelectionConfig = DPOConfig | RFTConfig
AlgorithmConfig = Annotated[PolicyGradientConfig | SelectionConfig, Field(discriminator="name")]

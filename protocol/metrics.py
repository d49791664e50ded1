"""The names of metrics. A KL's name says estimator and unit; a time's name says whether it is exposed or overlapped."""

OBJECTIVE_SCORE = "objective/score"
OBJECTIVE_REWARD = "objective/reward"
OBJECTIVE_KL = "objective/kl_k1_per_sequence"
OBJECTIVE_KL_BETA = "objective/kl_beta"

POLICY_LOSS = "policy/loss"
POLICY_ENTROPY = "policy/entropy"
POLICY_CLIP_FRACTION = "policy/clip_fraction"
POLICY_APPROX_KL = "policy/approx_kl"
POLICY_LR = "policy/lr"
POLICY_GRAD_NORM = "policy/grad_norm"
POLICY_FIRST_RATIO_GAP = "policy/first_minibatch_ratio_gap_max"
POLICY_FIRST_CLIP_FRACTION = "policy/first_minibatch_clip_fraction"
POLICY_SKIPPED_STEPS = "policy/skipped_steps"
POLICY_ADVANTAGE_STD = "policy/advantage_std"
POLICY_BETA_EFF = "policy/beta_eff"
POLICY_TARGET_POSITIVE = "policy/target_positive_fraction"
POLICY_RESIDUAL_MEAN = "policy/residual_mean"

VALUE_LOSS = "value/loss"
VALUE_EXPLAINED_VARIANCE = "value/explained_variance"
VALUE_LR = "value/lr"
VALUE_GRAD_NORM = "value/grad_norm"
VALUE_CLIP_FRACTION = "value/clip_fraction"
VALUE_SKIPPED_STEPS = "value/skipped_steps"

ROLLOUT_TOKENS_MEAN = "rollout/response_tokens_mean"
ROLLOUT_TRUNCATED = "rollout/truncated_fraction"
ROLLOUT_TOKENS_PER_S = "rollout/tokens_per_s"

SYNC_SECONDS = "sync/seconds"
SYNC_BYTES = "sync/bytes"
SYNC_LOGPROB_GAP = "sync/logprob_gap_max"
SYNC_CANARY_GAP = "sync/canary_gap_max"

TIME_GENERATE = "time/generate"
TIME_SCORE = "time/score"
TIME_LEARN = "time/learn"
TIME_PUBLISH = "time/publish"
TIME_ITERATION = "time/iteration"
TIME_STAGES = (TIME_GENERATE, TIME_SCORE, TIME_LEARN, TIME_PUBLISH)

BUSY_REWARD = "busy/reward"
BUSY_REFERENCE = "busy/reference"

COUNTER_ROUND = "counter/round"
COUNTER_ITERATION = "counter/iteration"
COUNTER_POLICY_VERSION = "counter/policy_version"
COUNTER_PROMPTS = "counter/prompts"
COUNTER_RESPONSE_TOKENS = "counter/response_tokens"

GOLD_PREFIX = "gold/"

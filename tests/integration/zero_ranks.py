"""What each rank process of test_zero_stages does: every ZeRO stage in turn, on the same data."""

import errno
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.algorithm import PPOConfig
from configs.kl import KLControllerConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner import checkpoint, weight_sender
from learner.engine import DeepSpeedEngine
from learner.experience import PassSettings, evaluate, flatten, passes
from learner.training import RankContext, TrainingEngine
from learner.update import Updater, UpdateSettings
from protocol.errors import NonFiniteError
from protocol.weights import WeightManifest
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.rank_processes import run_rank
from tests.small_disk import files_no_longer_than

HIDDEN = 128
"""Wide enough that ZeRO 3 really shards: smaller matrices stay whole on every rank."""
RATE = OptimizerConfig(learning_rate=3e-4)
ALGORITHM = PPOConfig(
    minibatch_responses=6,
    num_epochs=2,
    score_at="after_last_token",
    whiten_rewards=True,
    kl_controller=KLControllerConfig(kind="adaptive", horizon_episodes=100),
)
PASSES = PassSettings(temperature=0.8, token_budget=70, layout="sorted", pad_id=0)
SETTINGS = UpdateSettings(algorithm=ALGORITHM, passes=PASSES, max_response_tokens=24, run_seed=5)


def make_updater(context: RankContext, **settings: Any) -> Updater:
    config = LearnerConfig(**settings)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    policy, critic = tiny_policy(hidden=HIDDEN).to(precision), tiny_critic(hidden=HIDDEN).to(precision)
    common: dict[str, Any] = {"optimizer": RATE, "settings": config, "context": context}
    return Updater(
        policy=DeepSpeedEngine(policy, name="policy", **common),
        critic=DeepSpeedEngine(critic, name="critic", **common),
        settings=SETTINGS,
    )


def close(updater: Updater) -> None:
    updater.policy.close()
    updater.critic.close()


def accumulate(engine: TrainingEngine, *, poison_rank: int | None = None, poison: str = "loss") -> None:
    """Add up a gradient with weights that are fixed for each token, and differ between tokens."""
    responses = flatten(scored_batch(), device=engine.context.device)
    weights = torch.sin(torch.arange(responses.num_tokens, dtype=torch.float32)) / responses.num_tokens
    own = list(passes(responses, list(range(len(responses.keys))), settings=PASSES, engine=engine))
    for number, (m, index, _) in enumerate(own):
        logprobs, _ = engine.forward(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
        if poison_rank == engine.context.rank and poison == "gradient":  # of a loss that stays finite
            logprobs.register_hook(lambda gradient: gradient * torch.nan)
        loss = (logprobs * weights[index]).sum()
        if poison_rank == engine.context.rank and poison == "loss":
            loss = loss * torch.nan
        engine.backward(loss, last=number == len(own) - 1)


def full_weights(engine: TrainingEngine) -> Tensor:
    found = engine.gather(list(engine.parameter_shapes()))
    return torch.cat([tensor.flatten().float().clone() for tensor in found.values()])


def gradient_and_updates(context: RankContext, stage: int, directory: Path) -> dict[str, Any]:
    """Find the gradient of one step, the metrics of three updates, and whether a checkpoint continues them."""
    updater = make_updater(context, zero_stage=stage)
    accumulate(updater.policy)
    gradient = torch.cat([g.flatten() for g in updater.policy.full_gradient().values()])
    close(updater)

    updater = make_updater(context, zero_stage=stage)
    reports = [updater.update(scored_batch(seed=i, iteration=i)) for i in range(2)]
    assert updater.controller is not None
    state = checkpoint.LearnerState(
        policy_version=4,
        kl_controller=updater.controller.state_dict(),
        world_size=context.world_size,
        zero_stage=stage,
    )
    part = directory / f"checkpoint-{context.world_size}-{stage}"
    checkpoint.save(part, engines={"policy": updater.policy, "critic": updater.critic}, state=state)
    refused = refused_save(updater, state, part.with_name(f"{part.name}-refused"))
    reports.append(updater.update(scored_batch(seed=2, iteration=2)))
    last = full_weights(updater.policy)
    published = publication(updater.policy)
    close(updater)

    resumed = make_updater(context, zero_stage=stage)
    assert resumed.controller is not None
    engines = {"policy": resumed.policy, "critic": resumed.critic}
    found = checkpoint.load(part, engines=engines, zero_stage=stage)
    assert found == state
    resumed.controller.load_state_dict(found.kl_controller or {})
    report = resumed.update(scored_batch(seed=2, iteration=2))
    same = report == reports[-1] and torch.equal(full_weights(resumed.policy), last)
    close(resumed)
    return {
        "gradient": gradient,
        "metrics": [dict(report.metrics) for report in reports],
        "weights": last,
        "resumes_bit_for_bit": same,
        "refused": refused,
        "published_equals_weights": published,
    }


def refused_save(updater: Updater, state: checkpoint.LearnerState, directory: Path) -> str:
    """Save where one rank's disk takes no file of more than a few bytes, and return what this rank was told of it.

    What follows shows whether the ranks are still in step, and whether the attempt has left a trace.
    """
    context, stage = updater.policy.context, updater.policy._stage  # pyright: ignore[reportAttributeAccessIssue]
    # Without ZeRO rank 0 writes everything.
    writer = context.world_size - 1 if stage > 0 else 0
    try:
        with files_no_longer_than(5000) if context.rank == writer else nullcontext():
            checkpoint.save(directory, engines={"policy": updater.policy, "critic": updater.critic}, state=state)
    except OSError as error:
        return f"{errno.errorcode[error.errno or 0]}: {error.strerror}"
    return "it was taken"


def publication(engine: TrainingEngine) -> bool | None:
    """Compare the published buckets with the full parameters; other ranks than the first must yield nothing."""
    found = list(weight_sender.publish(engine, policy_version=1, bucket_bytes=50_000, dtype="float32"))
    everything = full_weights(engine)
    if engine.context.rank != 0:
        assert not found
        return None
    manifest = found.pop()
    assert isinstance(manifest, WeightManifest)
    assert len(found) > 3
    parts = [
        torch.from_numpy(found[slot.bucket][slot.offset : slot.offset + slot.spec.num_bytes]).view(torch.float32)
        for slot in manifest.slots
    ]
    return torch.equal(torch.cat(parts), everything)


def optimizer_state(engine: Any) -> list[Tensor]:
    """Copy this rank's part of what AdamW keeps: its moments and its count of steps."""
    optimizer = engine._engine.optimizer
    adamw = getattr(optimizer, "optimizer", optimizer)
    found = [t.clone() for state in adamw.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert any(t.numel() > 1 and t.any() for t in found)
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def raises(what: str, act: Any) -> bool:
    try:
        act()
    except NonFiniteError as error:
        return error.what == what
    return False


def guards(context: RankContext, stage: int, precision: str) -> dict[str, bool]:
    """Poison the last rank: skipping must leave no trace on any rank, stopping must stop all of them."""
    found: dict[str, bool] = {}
    last = context.world_size - 1
    skipping = make_updater(context, zero_stage=stage, precision=precision, on_nonfinite="skip").policy
    accumulate(skipping)
    found["applied_before"] = skipping.step().applied
    before = [full_weights(skipping), *optimizer_state(skipping)]
    for poison in ("loss", "gradient"):
        accumulate(skipping, poison_rank=last, poison=poison)
        found[f"{poison}_skipped"] = not skipping.step().applied
        after = [full_weights(skipping), *optimizer_state(skipping)]
        found[f"{poison}_untouched"] = same(before, after) and skipping.num_steps == 1
    accumulate(skipping)
    found["applied_after"] = skipping.step().applied and not torch.equal(full_weights(skipping), before[0])

    stopping = make_updater(context, zero_stage=stage, precision=precision).policy
    accumulate(stopping)
    stopping.step()
    before = [full_weights(stopping), *optimizer_state(stopping)]
    accumulate(stopping, poison_rank=last, poison="gradient")
    found["stopped"] = raises("gradient of the policy", stopping.step)
    found["stopped_untouched"] = same(before, [full_weights(stopping), *optimizer_state(stopping)])

    stopping.require_finite_parameters()
    if context.rank == last:
        parameter: Any = list(stopping.module.parameters())[-3]
        with torch.no_grad():
            getattr(parameter, "ds_tensor", parameter).view(-1)[0] = torch.nan
    found["parameter_found_on_all_ranks"] = raises("parameter of the policy", stopping.require_finite_parameters)
    return found


def evaluations_agree(context: RankContext) -> bool:
    """Check that the assembled log-probs are the same on every rank."""
    updater = make_updater(context, zero_stage=2)
    responses = flatten(scored_batch(), device=context.device)
    opinions = evaluate(responses, policy=updater.policy, critic=updater.critic, settings=PASSES)
    together = torch.cat([opinions.old_logprobs, opinions.values, opinions.final_values])
    total = updater.policy.all_reduce_sum(together.clone())
    return torch.equal(total, together * context.world_size)


def work(context: RankContext, directory: Path) -> dict[str, Any]:
    """Do everything."""
    findings: dict[str, Any] = {"stages": [gradient_and_updates(context, stage, directory) for stage in range(4)]}
    if context.world_size > 1:
        findings["guards"] = {
            (stage, precision): guards(context, stage, precision)
            for stage, precision in ((0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16"))
        }
        findings["evaluations_agree"] = evaluations_agree(context)
    return findings


if __name__ == "__main__":
    run_rank(work)

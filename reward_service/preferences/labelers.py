"""Makes the labeler that a configuration asks for."""

from configs.labels import JudgeConfig, RewardModelLabelerConfig, SimulatedLabelerConfig
from reward_service.functions import RewardFunction
from reward_service.preferences.completion import Completer, EndpointCompleter
from reward_service.preferences.judge import Judge
from reward_service.preferences.labeling_protocol import Labeler
from reward_service.preferences.scored import RewardModelLabeler, ScoreTexts
from reward_service.preferences.simulated import SimulatedLabeler


def make_labeler(
    config: SimulatedLabelerConfig | RewardModelLabelerConfig | JudgeConfig,
    *,
    run_seed: int,
    score: RewardFunction | None = None,
    score_texts: ScoreTexts | None = None,
    complete: Completer | None = None,
) -> Labeler:
    """Make a labeler. People are none of these: they label on the page.

    Args:
        config: Who labels.
        run_seed: The run's seed, for simulated people.
        score: The gold score of simulated people; by default the function that the configuration names.
        score_texts: Asks the reward model that labels.
        complete: Answers for the judge; by default the endpoint that the configuration names.

    Raises:
        UserError: If the configuration names a function, template, address or token that is not there.
        ValueError: If the caller did not provide what this labeler needs.
    """
    match config:
        case SimulatedLabelerConfig():
            return SimulatedLabeler(config, run_seed=run_seed, score=score)
        case RewardModelLabelerConfig():
            if score_texts is None:
                raise ValueError("a reward model as labeler needs score_texts")
            return RewardModelLabeler(config, score_texts=score_texts)
        case JudgeConfig():
            if complete is None and config.url is None:
                raise ValueError("a judge without url needs a completer over the run's own workers")
            return Judge(config, complete=EndpointCompleter(config) if complete is None else complete)

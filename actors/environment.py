"""The environment variables of a rollout process. They must be set before it imports torch or vLLM."""

from typing import Literal

from configs.rollout import RolloutConfig

Backend = Literal["cpu", "cuda"]


def environment(config: RolloutConfig, backend: Backend) -> dict[str, str]:
    """List the variables that a process needs before it may build an engine.

    Args:
        config: The threads of one worker.
        backend: Where the engine computes.

    Returns:
        Names and values, for a Ray `runtime_env` or a subprocess.
    """
    variables = {
        # The engine core lives in this process: no second start-up, no hop for each step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # What torch.distributed opens for one machine's ranks stays on the loopback device.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Below ERROR, vLLM and torch warn ten times a start of what is chosen on purpose here.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if backend == "cpu":
        threads = str(config.threads_per_worker)
        variables |= {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # Threads that spin while they wait for each other stand still for milliseconds when a core is shared.
            "OMP_WAIT_POLICY": "PASSIVE",
            # Threads are not pinned: several workers share the cores, and pinned ones would meet on the first.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Otherwise the first request waits 4 to 20 s for the log-prob gather to be compiled.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables

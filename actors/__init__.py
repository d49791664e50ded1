"""Rollout workers: a vLLM engine in a Ray process that turns prompts into rollouts."""

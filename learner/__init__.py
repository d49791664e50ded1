"""The learner: losses, batches, models and the DeepSpeed engine that applies them."""

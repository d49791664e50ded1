"""Pure functions of tensors: every loss and estimator, one topic a module."""

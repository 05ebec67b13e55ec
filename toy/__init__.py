"""The toy world: a tiny world whose truth is known, the models for it, and the study on it."""

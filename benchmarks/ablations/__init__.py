"""The effect of each choice of a config: one thing is changed, and trained again what that affects."""

"""The laboratory: each claim about a sampler or a policy is a number that one command reproduces."""

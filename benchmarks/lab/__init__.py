"""The laboratory: every claim about a sampler in this project is a number that one command makes again."""

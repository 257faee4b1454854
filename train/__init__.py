"""`python -m train`: partition, experts, router, bundle, samples, evaluation."""

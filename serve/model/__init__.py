"""A trained bundle that samples in this process: parameters, loading, the model."""

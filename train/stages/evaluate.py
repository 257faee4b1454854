"""The stage `evaluate`: the table of distances and the report."""

from train.config import Config
from train.evaluation.measure import evaluate
from train.stages.monolith import trained_monoliths


def evaluate_stage(config: Config) -> None:
    """Measure the run, beside its monolith where one is wanted. Raises `ArtifactError` where that is not trained."""
    evaluate(config, trained_monoliths(config, config.evaluate))

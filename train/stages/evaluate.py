"""The stage `evaluate`: the table of distances, the report, and the bundle's model card."""

from train.config import Config
from train.evaluation.measure import evaluate
from train.model_card import write_cards
from train.stages.monolith import trained_monoliths


def evaluate_stage(config: Config) -> None:
    """Measure the run, beside its monolith where one is wanted. Raises `ArtifactError` where that is not trained."""
    evaluate(config, trained_monoliths(config, config.evaluate))
    write_cards(config)

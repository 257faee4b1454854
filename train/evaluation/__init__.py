"""What measures: samples, features, scores, the report."""

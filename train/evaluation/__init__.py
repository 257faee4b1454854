"""What measures a run: samples, feature networks, scores, results and the report."""

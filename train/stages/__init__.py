"""The stages of a run, one file per stage."""

"""The driver and its workers: what happens between a Ray address and the end of a run."""

"""From documents to batches: prepare once, then read in a global order that any number of ranks can share."""

"""What one rank does: engine, loop, checkpoints, evaluation, records, export."""

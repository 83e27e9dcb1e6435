"""Recipe and resources to a plan: layout, batch, model size, memory, DeepSpeed config. Pure: no torch."""

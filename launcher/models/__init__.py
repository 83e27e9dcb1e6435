"""Building transformers models on every rank."""

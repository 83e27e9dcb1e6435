"""A package, so that its clusters end with its tests and not with the session."""

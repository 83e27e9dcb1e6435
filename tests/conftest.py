"""Fixtures that every test sees."""

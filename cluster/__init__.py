"""Placing and living: how a model replica runs, and `LLM`, its offline front."""

"""HTTP: the OpenAI-compatible routes, text in and out, balancing over engines, limits."""

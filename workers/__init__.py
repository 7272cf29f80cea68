"""Computation: model shards, layers, attention backends, KV tensors, sampler, weights."""

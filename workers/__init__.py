"""Computation: model shards, layers, attention backends, KV tensors, sampler, weights."""

import os

# OpenMP's threads wait for each other by spinning, by default for milliseconds. Where another
# process wants the cores that is a disaster (measured with four busy neighbours on two cores: 4
# tokens per second, against 480 with this bound). It counts only if torch is not imported yet.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

"""Layers. Each is given where it lives (device, type, group) when it is built."""

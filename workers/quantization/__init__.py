"""Weights that a checkpoint holds as small codes with scales: formats, and what is made of them."""

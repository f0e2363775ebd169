"""Kernels and their plain references. Importable alone; needs jax only."""

"""Measurements on a GPU; ``benchmarks/gpu.sh`` runs them."""

"""Probes, attention, likelihood, tokenizers, and metrics of generated images."""

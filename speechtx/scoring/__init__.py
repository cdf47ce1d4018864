"""Scoring: NIST sclite, significance and RESULTS.md. Works on text alone; must not import torch."""

"""Experiment: what lies in an experiment directory and how to open it again without the recipe."""

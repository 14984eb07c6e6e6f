"""Spatial arrays as targets: machines, mappings of cascades onto them and published evaluations, all of them data."""

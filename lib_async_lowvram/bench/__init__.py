"""Beside the layers: our own UNet, what competes on it, and what the demo and the benchmark print and draw."""

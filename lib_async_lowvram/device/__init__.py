"""Layer 1: what touches tensors and devices - streams, host memory, packed weights, device memory - and their judges."""

"""Pictures so large that their activations, and not the weights, decide what fits: tiles."""

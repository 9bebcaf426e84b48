"""Layer 0: pure scheduling logic - states, order, ring, plan, counters. Imports no torch, so it is tested without one."""

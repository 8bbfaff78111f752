"""From a value that a tap sees to an entry of the log: forward passes, policy, budget, gradients, and checks on exit."""

"""From a round's contributions to the next shared tensors: weights, rules, server optimizers."""

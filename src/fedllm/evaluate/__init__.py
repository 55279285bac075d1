"""What a model is worth on a set of examples: scores of texts, summed losses, greedy completions."""

"""Privacy in training: sums of which nobody sees a part, noise that is accounted for, and the attacks on both."""

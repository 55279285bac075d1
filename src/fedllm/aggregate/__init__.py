"""Updates -> next state: exact sums and server optimisers, as pure functions."""

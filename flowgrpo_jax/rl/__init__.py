"""Learning: advantage, likelihood, objective, regularizer, update."""

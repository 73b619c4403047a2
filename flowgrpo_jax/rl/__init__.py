"""Learning: advantage, likelihood, objectives, penalties, update. No sampling, no rewards."""

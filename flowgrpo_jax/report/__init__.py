"""The page of a run: curves, scores, pictures. What the numbers are is not for here."""

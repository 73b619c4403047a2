"""Images of weights that are there: pipeline, restore, evaluation, search. No learning."""

"""Images and scores of weights that are there: pipeline, evaluator, search. No learning."""

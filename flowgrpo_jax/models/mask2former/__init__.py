"""The detector of GenEval, Mask2Former on Swin: its network. Not the reward on it."""

"""Better images from more evaluations at inference time. Weights are not touched."""

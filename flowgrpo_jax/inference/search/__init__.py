"""Better images from more evaluations at inference time; weights stay as they are."""

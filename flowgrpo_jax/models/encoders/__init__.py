"""Networks that read text or pictures for others: CLIP, T5, BLIP. No flow model."""

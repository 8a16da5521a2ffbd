"""Remove backdoors from CLIP models, and prove it."""

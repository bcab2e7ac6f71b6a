"""Names and shapes of published checkpoints, one file a family, both ways."""

"""Files -> rows -> examples -> token rows -> batches."""

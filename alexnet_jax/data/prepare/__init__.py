"""Prepare data sets: one module per source, and the writer of array_record shards."""

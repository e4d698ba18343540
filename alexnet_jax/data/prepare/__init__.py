"""Preparing a data set: one module a source, and the writer of array_record shards."""

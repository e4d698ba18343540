"""Configs: each a document that says what it is, how long it takes and what to expect."""

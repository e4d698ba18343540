"""Tests of the report in a real browser: `make test-browser`."""

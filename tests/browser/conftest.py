"""A browser is for `make test-browser`, which names the file; all else passes it by."""

collect_ignore = ['test_report_in_chromium.py']

"""Skip these tests unless `make test-browser` names the file."""

collect_ignore = ['test_report_in_chromium.py']

"""What merging methods score on the zoos: measured by one command, told on one page."""

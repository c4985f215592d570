"""The command line: `cme-reward`."""

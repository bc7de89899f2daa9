"""From the command line and ``conf/`` to a checked config. No torch."""

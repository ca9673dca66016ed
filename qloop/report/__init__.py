"""Reports of a run: the console, log files, the plot and trackers."""

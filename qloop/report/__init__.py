"""What a run tells: the console, its log files, the plot, and trackers."""

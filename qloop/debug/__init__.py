"""Looking into a run: where its time goes."""

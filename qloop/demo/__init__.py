"""The embedded corpus, tokenizer and model: enough to try everything, on any machine, with no network."""

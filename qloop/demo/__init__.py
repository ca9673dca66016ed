"""The embedded corpus, tokenizer and model: enough to try everything with no network."""

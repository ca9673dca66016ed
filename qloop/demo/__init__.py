"""The embedded corpus, tokenizer and model, to try everything without a network."""

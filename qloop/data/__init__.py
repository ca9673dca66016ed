"""From source files to micro-batches: documents, tokens, packing, batches."""

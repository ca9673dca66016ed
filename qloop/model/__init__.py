"""The model: built for a method, checked for isolation, and its loss."""

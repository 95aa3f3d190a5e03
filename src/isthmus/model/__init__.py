"""The language model: its families, its cut, its adapters, and the split model that transformers sees."""

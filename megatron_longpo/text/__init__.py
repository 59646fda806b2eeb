"""What a tokenizer is needed for: chat templates, preprocessing, reading documents. Knows transformers."""

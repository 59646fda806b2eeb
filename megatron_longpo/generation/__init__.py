"""From text to samples: tokenizers and chat templates, preprocessing, self-generated pairs. Knows transformers."""

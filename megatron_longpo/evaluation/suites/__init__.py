"""The suites, one file and one class each; ``evaluation/registry.py`` lists them."""

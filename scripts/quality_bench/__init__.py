"""The parts of scripts/quality.py: models, texts, contestants, runs, the judge, comparisons, and the page."""

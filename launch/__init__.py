"""Command lines: `python -m launch.train`, `launch.evaluate`, `launch.benchmark`, from the root of the repository."""

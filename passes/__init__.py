"""The pass framework (base, pattern, matching, rewriting, manager, catalog, pipelines) and one file per pass."""

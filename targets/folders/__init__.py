"""Write output folders and read them back: models per rank, companions, digests and the manifest."""

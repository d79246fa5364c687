"""The contract between export and runtime: the manifest, the names and shapes of the graphs, the files. No torch."""

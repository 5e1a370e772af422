"""What is served: export, manifest, runtime."""

"""The VAE: objective, likelihoods, networks, and its training step."""

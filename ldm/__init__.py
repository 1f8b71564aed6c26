"""Latent diffusion models: train an autoencoder, train a diffusion model in its latents, sample pictures."""

__version__ = "0.1.0"

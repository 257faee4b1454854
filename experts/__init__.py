"""The UNet x0-denoiser, and how one expert learns."""

"""The UNet x0-denoiser, and the training of one expert."""

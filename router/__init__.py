"""Which expert moves a picture: networks, their exact targets, sources of alpha, policies, the routed denoiser."""

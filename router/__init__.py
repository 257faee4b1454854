"""Which experts denoise an image: networks, their exact targets, sources of alpha, policies, the
routed denoiser.
"""

"""Japanese Stable Diffusion: a Japanese prompt becomes a picture."""

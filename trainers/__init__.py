"""Training that personalises a text-to-image diffusion model; knows torch and diffusers, never the host."""
